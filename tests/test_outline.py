"""A graph of outlined layers is the graph; layers that are alike are one region."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3MoeConfig

import graphtune as gt
from graphtune.masks import causal_mask, default_position_ids
from graphtune.outline import END, outline
from graphtune.passes import ActivationCheckpoint, DoRA, LoRA, NEFTune, Quantize
from tests.oracles.models import (
    FAMILIES,
    VOCAB,
    assert_same_tensors,
    gradients,
    random_ids,
    tiny_gpt2,
    tiny_model,
)

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def llama(layers, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config).train()


def call(program, ids, padding=None):
    """Logits by way of the outline, and the outline."""
    found = outline(program.graph_module)
    inputs = ids, causal_mask(ids, padding), default_position_ids(ids, padding)
    return found.regions[END](*found.graph_module(*inputs))[0], found


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_an_outline_computes_the_same_bits(family):
    program = gt.capture(tiny_gpt2() if family == "gpt2" else tiny_model(family))
    before = str(program.graph)
    generator = torch.Generator().manual_seed(0)
    for rows, length in ((2, 9), (3, 14)):
        padding = torch.ones(rows, length, dtype=torch.int64)
        padding[0, : torch.randint(1, 5, (), generator=generator)] = 0
        ids = random_ids(rows, length)
        expected = program(ids, padding)
        found, outlined = call(program, ids, padding)
        assert torch.equal(found, expected)
        assert_same_tensors(gradients(found, program), gradients(expected, program))
    # Sliding and full attention differ by their mask, which is an input.
    assert list(outlined.regions) == ["region_0", END]
    stem = "transformer.h" if family == "gpt2" else "model.layers"
    assert outlined.calls == ((f"{stem}.0", "region_0"), (f"{stem}.1", "region_0"))
    assert str(program.graph) == before


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize(
    "passes",
    [
        [LoRA(rank=2, bias="all")],
        [Quantize(format="int8"), LoRA(rank=2)],
        [DoRA(rank=2, targets=("*.q_proj",)), ActivationCheckpoint("full")],
    ],
    ids=["lora", "qlora", "dora"],
)
def test_passes_are_outlined_too(family, passes):
    program = gt.capture(tiny_model(family)).apply(*passes)
    with torch.no_grad():
        for name, parameter in program.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ids = random_ids(2, 9)
    found, outlined = call(program, ids)
    expected = program(ids)
    assert torch.equal(found, expected)
    assert_same_tensors(gradients(found, program), gradients(expected, program))
    # The embedding is frozen, so that layer 0 need not give its input a gradient.
    assert list(outlined.regions) == ["region_0", "region_1", END]


def distinct(program):
    found = outline(program.graph_module)
    return [name for _, name in found.calls]


def test_regions_do_not_depend_on_depth():
    assert distinct(gt.capture(llama(5))) == ["region_0"] * 5
    adapted = gt.capture(llama(5)).apply(LoRA(rank=2))
    assert distinct(adapted) == ["region_0"] + ["region_1"] * 4


def test_layers_that_differ_have_regions_of_their_own():
    some = gt.capture(llama(4)).apply(LoRA(rank=2, layers=(2,)))
    assert distinct(some) == [
        "region_0",
        "region_0",
        "region_1",
        "region_2",
    ]  # gradients begin at 2

    ranks = ({"sites": "re:.*layers.3.*q_proj", "rank": 4}, "*.q_proj")
    wider = gt.capture(llama(4)).apply(LoRA(rank=2, targets=ranks))
    assert distinct(wider) == ["region_0", "region_1", "region_1", "region_2"]

    kept = gt.capture(llama(3)).apply(ActivationCheckpoint("full", layers=(1,)))
    assert distinct(kept) == ["region_0", "region_1", "region_0"]

    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, scale_attn_by_inverse_layer_idx=True
    )
    scaled = gt.capture(AutoModelForCausalLM.from_config(config).train())
    assert distinct(scaled) == ["region_0", "region_1"]

    config = Qwen3MoeConfig(
        **SHAPE,
        num_hidden_layers=3,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[1],
    )
    mixed = gt.capture(AutoModelForCausalLM.from_config(config).train())
    assert distinct(mixed) == ["region_0", "region_1", "region_0"]


def test_frozen_parameters_make_another_region():
    program = gt.capture(llama(3))
    program.model.layers.get_submodule("1").self_attn.q_proj.weight.requires_grad_(False)
    assert distinct(program) == ["region_0", "region_1", "region_0"]


def test_an_outline_reads_the_program_s_tensors():
    program = gt.capture(llama(3))
    found = outline(program.graph_module)
    ids = random_ids(2, 7)
    inputs = ids, causal_mask(ids, None), default_position_ids(ids, None)
    with torch.no_grad():
        program.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(3)
    assert torch.equal(found.regions[END](*found.graph_module(*inputs))[0], program(ids))
    program.load_state_dict(llama(3, seed=5).state_dict(), assign=True)
    assert torch.equal(found.regions[END](*found.graph_module(*inputs))[0], program(ids))
    assert not [name for name, _ in program.named_modules() if "region" in name]


def test_noise_and_dropout_are_drawn_as_by_the_graph():
    program = gt.capture(tiny_gpt2(dropout=0.3)).apply(LoRA(rank=2, dropout=0.3), NEFTune(alpha=5))
    ids = random_ids(2, 9)
    torch.manual_seed(4)
    expected = program(ids)
    torch.manual_seed(4)
    found, _ = call(program, ids)
    assert torch.equal(found, expected)
    torch.manual_seed(5)
    assert not torch.equal(call(program, ids)[0], expected)
