"""Tree, ledger and diff say what is in the program."""

import torch

import graphtune as gt
from graphtune.inspect import ledger
from graphtune.passes import LoRA, Quantize
from tests.oracles.models import FAMILIES, tiny_model


def program(layers=6):
    from transformers import AutoModelForCausalLM

    config = FAMILIES["llama"]()
    config.num_hidden_layers = layers
    with torch.device("meta"):
        return gt.capture(AutoModelForCausalLM.from_config(config))


def test_equal_layers_are_folded():
    lines = program().tree().splitlines()
    assert sum("LlamaDecoderLayer" in line for line in lines) == 1
    assert any("0-5 x6 LlamaDecoderLayer" in line for line in lines)
    assert sum("q_proj Linear 32→32" in line for line in lines) == 1
    assert any("embed_tokens Embedding 128x32" in line for line in lines)


def test_layers_that_differ_are_listed_apart_with_badges():
    tuned = program().apply(LoRA(rank=2, alpha=5, targets=["re:.*layers.[23].*q_proj"]))
    lines = tuned.tree().splitlines()
    layers = [line.split("─ ")[1] for line in lines if "LlamaDecoderLayer" in line]
    assert [layer.split(" LlamaDecoderLayer")[0] for layer in layers] == [
        "0-1 x2",
        "2-3 x2",
        "4-5 x2",
    ]
    badges = [line for line in lines if "[lora r2 α5]" in line]
    assert len(badges) == 1 and "q_proj" in badges[0]


def test_ledger_has_a_row_for_each_pass():
    text = ledger(program().apply(LoRA(rank=2, targets=["q_proj"])))
    row = next(line for line in text.splitlines() if "lora" in line)
    assert "identity_at_init" in row
    assert "rank=2" in row
    assert f"{6 * 2 * (32 + 32):+,}" in row


def test_diff_counts_operators_and_shows_one_layer():
    base = program(2)
    text = base.apply(LoRA(rank=2, targets=["layers.1.self_attn.q_proj"])).diff(base)
    assert "+2  aten.linear.default" in text
    assert "after (model.layers.1)" in text
    added = [line for line in text.splitlines() if line.startswith("+") and "lora_A" in line]
    assert added
    assert "none changed" in base.diff(base)


def test_tree_shows_quantized_weights_with_shape_and_format():
    program = gt.capture(tiny_model("llama")).apply(Quantize(format="int8"), LoRA(rank=2, alpha=4))
    assert "q_proj Linear 32→32 [int8] [lora r2 α4]" in program.tree()
    assert "down_proj Linear 48→32 [int8] [lora r2 α4]" in program.tree()
