"""A captured program computes what the eager `transformers` model computes, bit for bit."""

import pytest
import torch
from torch import nn

import graphtune as gt
from graphtune.data import collate_packed, pack
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


def test_packed_batch_equals_its_sequences(pair):
    model, program = pair
    examples = []
    for seed, length in enumerate((7, 12, 5, 9)):
        ids = random_ids(1, length, seed=seed)[0].tolist()
        examples.append({"input_ids": ids, "labels": ids})
    batch = collate_packed(pack(examples, 20), length=20, pad_token_id=0)
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
    assert program(random_ids(2, 6).to("meta")).shape == (2, 6, 128)


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


def test_refuses_a_model_without_attention_mask():
    with pytest.raises(gt.UserError, match="attention_mask"):
        gt.capture(nn.Embedding(4, 4))


def test_refuses_a_cast_after_capture():
    with pytest.raises(gt.UserError, match="dtype"):
        gt.capture(tiny_model("llama")).to(torch.bfloat16)
