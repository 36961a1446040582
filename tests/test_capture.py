"""A captured program computes what the eager `transformers` model computes, bit for bit."""

import pytest
import torch
from torch import fx, nn

import graphtune as gt
from graphtune.data import collate_packed, pack
from graphtune.program import Program
from tests.oracles.models import (
    FAMILIES,
    assert_same_tensors,
    gradients,
    random_ids,
    tiny_gpt2,
    tiny_model,
)

# Capture itself uses batch 3 and length 11.
SIZES = [(2, 17), (4, 9)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Programs share one `forward`, and torch.compile gives up on code it met in many forms."""
    torch.compiler.reset()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request):
    model = tiny_model(request.param)
    return model, gt.capture(model)


@pytest.mark.parametrize(("batch", "length"), SIZES)
def test_logits_and_gradients_are_bitwise_equal(pair, batch, length):
    model, program = pair
    ids = random_ids(batch, length)
    expected = model(input_ids=ids, use_cache=False).logits
    found = program(ids)
    assert torch.equal(found, expected)
    assert_same_tensors(gradients(found, program), gradients(expected, model))


def test_padded_batch_is_bitwise_equal(pair):
    model, program = pair
    ids = random_ids(3, 14)
    padding = torch.ones(3, 14, dtype=torch.int64)
    padding[0, :4] = 0
    padding[1, :9] = 0
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    expected = model(
        input_ids=ids, attention_mask=padding, position_ids=positions, use_cache=False
    ).logits
    found = program(ids, padding)
    assert torch.equal(found[padding.bool()], expected[padding.bool()])


def test_eager_attention_adds_the_mask_that_the_boolean_one_means():
    model = tiny_model("gemma2")
    assert model.config._attn_implementation == "eager"
    program = gt.capture(model)
    (placeholder,) = program.graph.find_nodes(op="placeholder", target="attention_mask")
    assert placeholder.meta["val"].dtype == torch.bool
    length = 14
    query, key = torch.arange(length)[:, None], torch.arange(length)
    allowed = torch.stack([key <= query, (key <= query) & ((key < 6) == (query < 6))])[:, None]
    near = query - key < model.config.sliding_window
    masks = {"full_attention": allowed, "sliding_attention": allowed & near}
    least = torch.finfo(torch.float32).min
    additive = {
        kind: torch.where(mask, torch.tensor(0.0), torch.tensor(least))
        for kind, mask in masks.items()
    }
    ids = random_ids(2, length)
    expected = model(input_ids=ids, attention_mask=additive, use_cache=False).logits
    found = program(ids, allowed)
    assert torch.equal(found, expected)
    assert_same_tensors(gradients(found, program), gradients(expected, model))


def test_half_precision_adds_a_mask_of_its_own_dtype():
    model = tiny_model("gemma2").bfloat16()
    program = gt.capture(model)
    ids = random_ids(2, 13)
    assert torch.equal(program(ids), model(input_ids=ids, use_cache=False).logits)


def test_eager_attention_is_captured_where_it_was_chosen():
    model = tiny_model("qwen2")
    model.set_attn_implementation("eager")
    program = gt.capture(model)
    ids = random_ids(2, 13)
    assert torch.equal(program(ids), model(input_ids=ids, use_cache=False).logits)


def test_packed_batch_equals_its_sequences(pair):
    model, program = pair
    examples = []
    for seed, length in enumerate((7, 12, 5, 9)):
        ids = random_ids(1, length, seed=seed)[0].tolist()
        examples.append({"input_ids": ids, "labels": ids})
    rows = pack([len(example["input_ids"]) for example in examples], 20).rows()
    batch = collate_packed([[examples[i] for i in row] for row in rows], length=20)
    logits = program(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
    starts = (batch["position_ids"] == 0).nonzero().tolist()
    seen = 0
    for example in examples:
        ids = torch.tensor(example["input_ids"])
        expected = model(input_ids=ids[None], use_cache=False).logits[0]
        for row, start in starts:
            window = slice(start, start + len(ids))
            if torch.equal(batch["input_ids"][row, window], ids):
                torch.testing.assert_close(logits[row, window], expected, atol=1e-5, rtol=1e-5)
                seen += 1
    assert seen == len(examples)


def test_one_row_and_one_token(pair):
    model, program = pair
    ids = random_ids(1, 1)
    torch.testing.assert_close(program(ids), model(input_ids=ids, use_cache=False).logits)


def test_names_values_and_ties_are_the_models(pair):
    model, program = pair
    assert [n for n, _ in program.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert_same_tensors(program.state_dict(), model.state_dict())
    tied = model.config.tie_word_embeddings
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    parameters = program.all_parameters()
    assert (parameters["model.embed_tokens.weight"] is parameters["lm_head.weight"]) == tied


def test_compiles_with_dynamic_shapes(pair):
    _, program = pair
    compiled = torch.compile(program, backend="aot_eager", dynamic=True, fullgraph=True)
    for batch, length in SIZES:
        ids = random_ids(batch, length)
        assert torch.equal(compiled(ids), program(ids))


def test_captures_without_weights_on_the_meta_device():
    model = tiny_model("llama")
    program = gt.capture(model.to("meta"))
    assert all(parameter.is_meta for parameter in program.parameters())
    with pytest.raises(gt.UserError, match="no weights yet"):
        program(random_ids(2, 6).to("meta"))


def _shape(graph):
    """A graph's nodes, with inputs by number: names may differ."""
    number = {node: i for i, node in enumerate(graph.nodes)}
    inputs = [fx.node.map_arg((n.args, n.kwargs), number.__getitem__) for n in graph.nodes]
    return [(n.op, n.target, *given) for n, given in zip(graph.nodes, inputs, strict=True)]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in [*sorted(FAMILIES), "gpt2"]),
        *((family, torch.bfloat16) for family in ("gemma2", "gemma3", "mixtral")),
    ],
)
def test_capture_without_weights_is_the_capture_with_them(family, dtype, tmp_path, monkeypatch):
    # Kept by another process, Gemma 3's two rotary tables may come in another order.
    monkeypatch.setenv("GRAPHTUNE_CACHE", str(tmp_path / "cache"))
    model = tiny_gpt2() if family == "gpt2" else tiny_model(family)
    model.to(dtype).save_pretrained(tmp_path / "model")
    real = gt.capture(gt.load_model(tmp_path / "model", dtype=dtype, device="cpu"))
    empty = gt.capture(gt.load_model(tmp_path / "model", dtype=dtype, device="meta"))
    assert _shape(empty.graph) == _shape(real.graph)
    weights, buffers = real.all_parameters(), empty.all_buffers()
    assert empty.all_parameters().keys() == weights.keys()
    assert len(list(empty.parameters())) == len(list(real.parameters()))  # tied as it is
    for name, parameter in empty.all_parameters().items():
        expected = (weights[name].shape, weights[name].dtype)
        assert parameter.is_meta and (parameter.shape, parameter.dtype) == expected
    assert_same_tensors(
        {name: buffer for name, (buffer, _) in buffers.items()},
        {name: buffer for name, (buffer, _) in real.all_buffers().items()},
    )
    filled = Program(empty.graph, weights, buffers, empty.info).train()
    ids = random_ids(2, 13)
    assert torch.equal(filled(ids), real(ids))


class _Bigram(nn.Module):
    """A causal language model that is not from `transformers`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        mixed = nn.functional.scaled_dot_product_attention(
            x[:, None], x[:, None], x[:, None], attn_mask=attention_mask
        )
        return self.head(mixed[:, 0])


def test_captures_any_module():
    model = _Bigram()
    program = gt.capture(model)
    ids = torch.randint(0, 16, (3, 7))
    mask = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    assert torch.equal(program(ids), model(ids, mask))


class _Shifted(_Bigram):
    def forward(self, input_ids, attention_mask):
        shift = torch.tensor([0.5], device=input_ids.device)
        return super().forward(input_ids, attention_mask) + shift


def test_a_constant_of_forward_is_kept():
    model = _Shifted()
    program = gt.capture(model)
    ids = torch.randint(0, 16, (3, 7))
    mask = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    assert torch.equal(program(ids), model(ids, mask))
    assert program.state_dict().keys() == model.state_dict().keys()


def test_a_constant_that_meta_tracing_loses_is_refused():
    model = _Shifted().to("meta")
    model.graphtune_buffers = {}
    with pytest.raises(gt.UserError, match="makes a constant"):
        gt.capture(model)


def test_learned_positions_and_conv1d():
    model = tiny_gpt2()
    program = gt.capture(model)
    ids = random_ids(2, 13)
    expected = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(program(ids), expected)
    assert_same_tensors(gradients(program(ids), program), gradients(expected, model))


def test_train_and_eval_switch_dropout():
    model = tiny_gpt2(dropout=0.4)
    program = gt.capture(model)
    ids = random_ids(2, 13)
    assert not torch.equal(program(ids), program(ids))
    torch.manual_seed(3)
    expected = model(input_ids=ids, use_cache=False).logits
    torch.manual_seed(3)
    assert torch.equal(program(ids), expected)
    model.eval()
    assert torch.equal(program.eval()(ids), model(input_ids=ids, use_cache=False).logits)
    assert not torch.equal(program.train()(ids), program(ids))


def test_compiled_program_switches_dropout():
    program = gt.capture(tiny_gpt2(dropout=0.4))
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    ids = random_ids(2, 13)
    assert not torch.equal(compiled(ids), compiled(ids))
    program.eval()
    assert torch.equal(compiled(ids), compiled(ids))


def test_refuses_activation_checkpointing():
    model = tiny_model("llama")
    model.activation_checkpointing_enable()
    with pytest.raises(gt.UserError, match="activation_checkpointing_disable"):
        gt.capture(model)


def test_refuses_what_no_graph_can_hold():
    model = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    with pytest.raises(gt.UserError, match="set_experts_implementation"):
        gt.capture(model)
    model = tiny_model("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(gt.UserError, match="'flex_attention'.*set_attn_implementation"):
        gt.capture(model)


def test_refuses_a_model_without_attention_mask():
    with pytest.raises(gt.UserError, match="attention_mask"):
        gt.capture(nn.Embedding(4, 4))


def test_refuses_a_cast_after_capture():
    with pytest.raises(gt.UserError, match="dtype"):
        gt.capture(tiny_model("llama")).to(torch.bfloat16)
