"""FusedLoss against logits and `cross_entropy`, and against torch's own loss."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import graphtune as gt
from graphtune.errors import UserError
from graphtune.gradients import with_gradients
from graphtune.losses import (
    cross_entropy,
    labelled_rows,
    loss_sum,
    shift_labels,
    token_cross_entropy,
    token_cross_entropy_slope,
    with_rows,
)
from graphtune.passes import DoRA, Full, FusedLoss, LoRA, Merge, Quantize
from graphtune.training.evaluate import evaluate_loss
from tests.oracles.models import FAMILIES, VOCAB, random_ids, tiny_gpt2, tiny_model

HEADS = {
    "frozen": [LoRA(rank=4)],
    "lora": [LoRA(rank=4, targets=["lm_head", "*.o_proj"])],
    "dora": [DoRA(rank=4, targets=["lm_head", "*.o_proj"])],
    "trained": [Full()],
    "quantized": [Quantize("int8", targets=["lm_head"]), LoRA(rank=2)],
}


def model(family: str) -> nn.Module:
    """A tiny model whose padding token is no zero row, which DoRA cannot scale."""
    made = tiny_model(family)
    with torch.no_grad():
        made.get_input_embeddings().weight[0] = 0.1  # type: ignore[operator]
    return made


def moved(program: gt.Program) -> gt.Program:
    """Adapters start at zero; tests want them to do something."""
    torch.manual_seed(3)
    for name, parameter in program.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return program


def masked_batch(rows: int, length: int, share: float, seed: int = 0) -> dict[str, Tensor]:
    ids = random_ids(rows, length, seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(ids.shape, generator=generator) < share
    hidden[0, 1] = False  # something is left to learn
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(hidden, -100),
        "weights": torch.rand(ids.shape, generator=generator) + 0.1,
    }


def assert_same_step(program: gt.Program, fused: gt.Program, batch: dict[str, Tensor]) -> None:
    expected = cross_entropy(program(batch["input_ids"]), batch["labels"], batch.get("weights"))
    found = loss_sum(fused, with_rows(fused, batch))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    trained = list(program.trainable_parameters())
    names = [n for n, p in program.named_parameters() if p.requires_grad]
    gradients = (torch.autograd.grad(one, trained) for one in (expected, found))
    for name, e, f in zip(names, *gradients, strict=True):
        assert float((e - f).norm()) <= 2e-6 * float(e.norm()) + 1e-9, name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_logits(family: str, head: str) -> None:
    program = moved(gt.capture(model(family)).apply(*HEADS[head]))
    assert_same_step(program, program.apply(FusedLoss(chunks=3)), masked_batch(3, 9, 0.5))


@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 4),
    length=st.integers(2, 17),
    chunks=st.integers(1, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_any_shape_and_any_mask(rows: int, length: int, chunks: int, share: float, seed: int):
    program = _program()
    batch = masked_batch(rows, length, share, seed)
    assert_same_step(program, program.apply(FusedLoss(chunks=chunks)), batch)


_made: list[gt.Program] = []


def _program() -> gt.Program:
    if not _made:
        _made.append(moved(gt.capture(tiny_model("gemma2")).apply(LoRA(rank=2))))
    return _made[0]


@pytest.mark.parametrize("head", HEADS)
def test_log_probabilities_of_sequences(head: str) -> None:
    program = moved(gt.capture(model("llama")).apply(*HEADS[head]))
    fused = program.apply(FusedLoss(chunks=2, output="log_probs"))
    batch = masked_batch(4, 8, 0.3)
    del batch["weights"]
    ids, labels = batch["input_ids"], batch["labels"]
    targets = shift_labels(labels)
    each = program(ids).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    expected = each.where(targets != -100, 0).sum(1)
    given_ = with_rows(fused, batch)
    of_row = (given_["rows"] // ids.shape[1]).flatten()
    found = torch.zeros(4).index_add(0, of_row, loss_sum(fused, given_).flatten())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    trained = list(program.trainable_parameters())
    sides = (
        torch.autograd.grad(F.logsigmoid(x[:2] - x[2:]).sum(), trained) for x in (expected, found)
    )
    for e, f in zip(*sides, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"z_loss": 1e-2}])
def test_options_of_the_loss(options: dict[str, float]) -> None:
    program = _program()
    batch = masked_batch(2, 11, 0.4)
    fused = program.apply(FusedLoss(chunks=2, **options))
    expected = cross_entropy(
        program(batch["input_ids"]), batch["labels"], batch["weights"], **options
    )
    found = loss_sum(fused, with_rows(fused, batch))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    trained = list(program.trainable_parameters())
    for e, f in zip(*(torch.autograd.grad(x, trained) for x in (expected, found)), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.2, 0.0), (0.0, 0.1), (0.1, 0.3)])
def test_slope_is_the_gradient(smoothing: float, z_loss: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 13, requires_grad=True)
    targets, weights = torch.randint(13, (5,)), torch.rand(5)
    each = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    each = each + z_loss * logits.logsumexp(-1).square()
    torch.testing.assert_close(token_cross_entropy(logits, targets, smoothing, z_loss), each)
    (expected,) = torch.autograd.grad((each * weights).sum(), logits)
    found = token_cross_entropy_slope(logits.detach(), targets, weights, smoothing, z_loss)
    torch.testing.assert_close(found, expected)


def test_rows_of_a_batch() -> None:
    labels = torch.tensor([[7, 8, -100, 9], [-100, -100, -100, 5]])
    found = labelled_rows(labels, chunks=2)
    assert found["rows"].tolist() == [[0, 2], [6, 0]]
    assert found["targets"].tolist() == [[8, 9], [5, 0]]
    assert found["row_weights"].tolist() == [[1, 1], [1, 0]]


def test_known_gradients_scale_with_what_is_made_of_the_value() -> None:
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(4)
    value = with_gradients(x.detach().sum(1), [x], [torch.full((4, 3), 2.0)])
    (found,) = torch.autograd.grad((value * w).sum(), x)
    torch.testing.assert_close(found, 2 * w[:, None].expand(4, 3))


class Largest(TorchDispatchMode):
    """The most elements that a result of an operator has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_no_tensor_of_all_logits(head: str) -> None:
    program = gt.capture(model("llama")).apply(*HEADS[head])
    fused = program.apply(FusedLoss(chunks=8))
    batch = masked_batch(4, 64, 0.0)
    tokens = batch["input_ids"].numel()
    with Largest() as plain:
        cross_entropy(program(batch["input_ids"]), batch["labels"]).backward()
    with Largest() as chunked:
        loss_sum(fused, with_rows(fused, batch)).backward()
    assert plain.elements >= tokens * VOCAB
    assert chunked.elements <= tokens * VOCAB / 2  # attention's mask and scores are the largest


def test_masked_rows_cost_no_head() -> None:
    """Work of the head is that of the labelled rows: 4 products for each of their weights."""
    from torch.utils.flop_counter import FlopCounterMode

    program = gt.capture(tiny_model("llama")).apply(LoRA(rank=2))
    fused = program.apply(FusedLoss(chunks=2))
    flops = []
    for learned in (64, 16):
        batch = {"input_ids": random_ids(2, 65)}
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, : 65 - learned] = -100
        with FlopCounterMode(display=False) as counter:
            loss_sum(fused, with_rows(fused, batch)).backward()
        flops.append(counter.get_total_flops())
    width = program.get_parameter("model.norm.weight").numel()
    assert flops[0] - flops[1] == 4 * width * VOCAB * 2 * (64 - 16)


@pytest.mark.parametrize("compile", [False, True])
def test_steps_as_without_it_and_compiles_once(compile: bool) -> None:
    programs = [moved(gt.capture(tiny_model("llama")).apply(LoRA(rank=2))) for _ in range(2)]
    programs[0] = programs[0].apply(FusedLoss(chunks=2))
    steps = [
        gt.compile_step(
            one,
            torch.optim.AdamW(one.trainable_parameters(), lr=1e-2),
            compile=compile and index == 0,
        )
        for index, one in enumerate(programs)
    ]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed, share in enumerate((0.9, 0.2, 0.5, 0.0)):
        batch = masked_batch(2, 12, share, seed)
        found, expected = (step(batch) for step in steps)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for e, f in zip(*(one.trainable_parameters() for one in programs), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == int(compile)


def test_evaluation_without_gradients() -> None:
    program = _program()
    fused = program.apply(FusedLoss(chunks=2, backward=False))
    batch = masked_batch(2, 9, 0.5)
    assert evaluate_loss(fused, [batch]) == pytest.approx(evaluate_loss(program, [batch]), rel=1e-6)
    assert len(fused.graph.nodes) < len(program.apply(FusedLoss(chunks=2)).graph.nodes)


def test_saved_and_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    fused = _program().apply(FusedLoss(chunks=2))
    loaded = gt.Program.load(fused.save(tmp_path / "fused.gt"))
    batch = masked_batch(2, 9, 0.5)
    assert torch.equal(*(loss_sum(one, with_rows(one, batch)) for one in (fused, loaded)))


def test_what_cannot_be() -> None:
    program = _program()
    with pytest.raises(UserError, match=r"chunks=0.*at least 1"):
        FusedLoss(chunks=0)
    with pytest.raises(UserError, match="loss or log_probs"):
        FusedLoss(output="logits")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot follow"):
        program.apply(FusedLoss(), FusedLoss())
    with pytest.raises(UserError, match="rows, targets, row_weights"):
        program.apply(FusedLoss())(random_ids(2, 5))
    dropping = gt.capture(tiny_model("llama")).apply(LoRA(rank=2, dropout=0.1, targets=["lm_head"]))
    with pytest.raises(UserError, match="drops at random"):
        dropping.apply(FusedLoss())


def test_of_gpt2_and_merged_models() -> None:
    program = gt.capture(tiny_gpt2(dropout=0.0)).apply(Full())
    assert_same_step(program, program.apply(FusedLoss(chunks=2)), masked_batch(2, 6, 0.4))
    merged = moved(gt.capture(tiny_model("qwen3")).apply(LoRA(rank=2))).apply(Merge(), Full())
    assert_same_step(merged, merged.apply(FusedLoss(chunks=2)), masked_batch(2, 6, 0.4))


def test_dropout_before_the_head_is_no_difference() -> None:
    program = gt.capture(tiny_model("llama")).apply(LoRA(rank=2, dropout=0.5))
    moved(program)
    assert program.training
    fused = program.apply(FusedLoss(chunks=2))  # which compares both
    assert fused.training
    batch = masked_batch(2, 6, 0.4)
    losses = {loss_sum(fused, with_rows(fused, batch)).item() for _ in range(3)}
    assert len(losses) == 3  # it still drops
