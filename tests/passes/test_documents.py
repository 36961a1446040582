"""Rows of several texts without a mask: the same step, for the work of each text alone."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import graphtune as gt
from graphtune.image_inputs import as_taken
from graphtune.passes import ActivationCheckpoint, CausalAttention, Full, FusedLoss, LoRA, optimized
from tests.oracles.kernels import counting
from tests.oracles.models import random_ids, tiny_gpt2, tiny_model
from tests.oracles.packed import masked, packed

FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
ROWS = [(9, 4, 3), (5, 8), (2, 2, 2)]
LENGTH = 16


@functools.cache
def captured(family):
    """A model, and its program; nothing trains either."""
    model = tiny_gpt2() if family == "gpt2" else tiny_model(family)
    return model, gt.capture(model)


def base(family, *passes):
    return captured(family)[1].apply(*passes)


def make_step(program, **options):
    optimizer = torch.optim.SGD(program.trainable_parameters(), lr=0.1)
    return gt.compile_step(program, optimizer, **options)


def loss_and_gradients(program, batch, **options):
    step = make_step(program, **{"compile": False, **options})
    loss = step.loss_sum(batch)
    return [loss, *torch.autograd.grad(loss, step.parameters)]


def assert_close(found, expected, tolerance=1e-5):
    """Each relative to its own size; some gradients are zero, but for rounding."""
    norms = [float(one.detach().norm()) for one in expected]
    for one, other, norm in zip(found, expected, norms, strict=True):
        off = float((one - other).detach().norm())
        assert off <= tolerance * max(norm, 1e-2 * max(norms))


def alone_by_transformers(model, batch):
    """Summed loss of each text by itself, and its gradients."""
    total = torch.zeros(())
    for ids, labels, places in zip(
        batch["input_ids"], batch["labels"], batch["position_ids"], strict=True
    ):
        starts = (places == 1).nonzero().flatten() - 1
        for start in starts.tolist():
            end = start + 1
            while end < len(places) and places[end] == end - start:
                end += 1
            text = ids[None, start:end]
            assert torch.equal(text[0, 1:], labels[start + 1 : end])
            logits = model(input_ids=text, use_cache=False).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, text[0, 1:], reduction="sum")
    return [total, *torch.autograd.grad(total, list(model.parameters()))]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "qwen3_moe"])
def test_a_packed_step_is_that_of_each_text_alone(family):
    """Those of gemma2 keep their mask; of gemma3, those in windows."""
    model, program = captured(family)
    program = program.apply(Full())
    batch = packed(ROWS, LENGTH)
    found = loss_and_gradients(optimized(program), batch)
    assert_close(found, loss_and_gradients(program, masked(batch)))
    assert_close(found, alone_by_transformers(model, batch), 1e-4)


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("llama", {"documents"}),
        ("gemma3", {"documents", "attention_mask"}),
        ("mistral", {"attention_mask"}),
    ],
)
def test_a_mask_is_made_where_attention_reads_one(family, told):
    program = base(family, CausalAttention())
    batch = packed(ROWS, LENGTH)
    assert as_taken(program, batch).keys() - batch.keys() == told
    for given in (masked(batch), {"input_ids": batch["input_ids"], "labels": batch["labels"]}):
        assert as_taken(program, given).keys() == given.keys()
    without = as_taken(base(family), batch)
    assert torch.equal(without["attention_mask"], masked(batch)["attention_mask"])


def test_a_row_of_one_text_needs_no_mask():
    """Where no graph takes documents, padding at the end is left to what is causal."""
    program = base("mistral")
    assert "attention_mask" not in as_taken(program, packed([(9,), (16,)], LENGTH))
    assert "attention_mask" in as_taken(program, packed([(9,), (12, 4)], LENGTH))


def test_attention_with_dropout_keeps_its_mask():
    program = gt.capture(tiny_gpt2(dropout=0.5)).apply(CausalAttention())
    assert program.packed is None and program.unmasked is not None
    batch = packed(ROWS, LENGTH)
    assert "attention_mask" in as_taken(program, batch)
    with pytest.raises(gt.UserError, match="takes no documents"):
        program(batch["input_ids"], documents=torch.tensor([[0, 9], [9, 13]]))


class Shapes(TorchDispatchMode):
    """The last two sizes of all that operators return."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.found |= {one.shape[-2:] for one in tree_leaves(result) if torch.is_tensor(one)}
        return result


def test_nothing_is_as_large_as_a_mask():
    program = base("llama", Full())
    batch = packed([(9, 4, 6), (5, 8, 6)], 19)
    for one, given, quadratic in (
        (program, masked(batch), True),
        (optimized(program), batch, False),
    ):
        with Shapes() as shapes:
            loss_and_gradients(one, given)
        assert ((19, 19) in shapes.found) == quadratic


@pytest.mark.parametrize(("mode", "again"), [("selective", 0), ("full", 1)])
def test_each_text_is_attended_to_once_and_once_more_where_it_is_recomputed(mode, again):
    plain = base("llama", LoRA(rank=2))
    program = optimized(plain.apply(ActivationCheckpoint(mode)))
    batch = packed(ROWS, LENGTH)
    with counting(FORWARD, BACKWARD) as calls:
        found = loss_and_gradients(program, batch)
    assert len(calls[FORWARD]) == 2 * 8 * (1 + again)  # layers, texts
    assert len(calls[BACKWARD]) == 2 * 8
    assert_close(found, loss_and_gradients(plain, masked(batch)))


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        ("whole", "selective"),
        pytest.param("whole", "none", marks=pytest.mark.slow),
        pytest.param("layers", "none", marks=pytest.mark.slow),
        pytest.param("layers", "selective", marks=pytest.mark.slow),
    ],
)
def test_batches_of_any_number_of_texts_run_compiled_code(not_lowered, how, mode):
    plain = base("llama", LoRA(rank=2), FusedLoss(chunks=2))
    step = make_step(optimized(plain.apply(ActivationCheckpoint(mode))), compile=how)
    compiled = None
    for rows in (ROWS, [(2,) * 8] * 3, [(16,)] * 3, [(2,), (), (4, 12)], [(3, 13), (5,), ()]):
        batch = packed(rows, LENGTH)
        loss = step.loss_sum(batch)
        with counting(BACKWARD) as calls:
            found = [loss, *torch.autograd.grad(loss, step.parameters)]
        assert len(calls[BACKWARD]) == 2 * (1 if rows == [(16,)] * 3 else sum(map(len, rows)))
        assert_close(found, loss_and_gradients(plain, masked(batch)))
        assert step.compilations == (compiled := compiled or step.compilations)


@pytest.mark.slow  # the C++ compiler
def test_lowered_code_is_the_same():
    torch._dynamo.reset()
    plain = base("llama", LoRA(rank=2))
    batch = packed(ROWS, LENGTH)
    found = loss_and_gradients(optimized(plain), batch, compile=True)
    assert_close(found, loss_and_gradients(plain, masked(batch)))


def test_compiled_gradients_are_checked_on_pieces_of_texts(not_lowered):
    step = make_step(optimized(base("llama", LoRA(rank=2))), compile="whole")
    assert step.check(packed([(40, 60), (90, 7), (30, 30)], 100)) < 1e-5


def test_documents_follow_the_rows_of_a_call():
    """The program itself is told by them, and by nothing else, what tokens see."""
    program = optimized(base("llama"))
    ids = random_ids(2, 12)
    documents = torch.tensor([[0, 5], [5, 12], [12, 24]])
    together = program(ids, documents=documents)
    torch.testing.assert_close(together[0, :5], program(ids[:1, :5])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], program(ids)[1], rtol=1e-4, atol=1e-5)
