"""Adapters go to PEFT and come back, and are told apart by the base model they were made for."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import graphtune as gt
from graphtune.export.peft import from_peft, to_peft
from graphtune.passes import DoRA, LoRA
from tests.oracles.models import random_ids, tiny_gpt2, tiny_model
from tests.oracles.peft import logits, peft_model, same_start

IDS = random_ids(2, 9)
VARIANTS = {
    "rslora": (
        "llama",
        LoRA(rank=4, alpha=8, rslora=True, targets=["q_proj", "down_proj"]),
        {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    ),
    "ranks": (
        "llama",
        LoRA(
            rank=4,
            alpha=8,
            targets=[{"sites": "q_proj", "layers": [1], "rank": 2, "alpha": 3}, "all-linear"],
        ),
        {
            "rank_pattern": {r"layers\.1\..*q_proj": 2},
            "alpha_pattern": {r"layers\.1\..*q_proj": 3},
        },
    ),
    "dora and embedding": (
        "qwen2",
        DoRA(rank=4, alpha=8, targets=["q_proj", "embed_tokens"]),
        {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    ),
    "all biases": (
        "qwen2",
        LoRA(rank=4, alpha=8, targets=["q_proj"], bias="all"),
        {"target_modules": ["q_proj"], "bias": "all"},
    ),
    "own biases": (
        "qwen2",
        LoRA(rank=4, alpha=8, targets=["q_proj"], bias="lora_only"),
        {"target_modules": ["q_proj"], "bias": "lora_only"},
    ),
    "modules": (
        "llama",
        LoRA(rank=4, alpha=8, targets=["q_proj"], modules_to_save=["lm_head", "model.norm"]),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    ),
    "conv1d": ("gpt2", LoRA(rank=4, alpha=8), {"fan_in_fan_out": True}),
}


def tiny(family):
    return tiny_gpt2() if family == "gpt2" else tiny_model(family)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_goes_to_peft_and_back(variant, tmp_path):
    family, adapter, options = VARIANTS[variant]
    model = tiny(family)
    base = gt.capture(model)
    program = base.apply(adapter)
    reference = peft_model(model, **options)
    same_start(reference, program)
    expected = program(IDS)

    to_peft(program, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    assert torch.equal(logits(theirs, IDS), expected)
    assert torch.equal(from_peft(base, tmp_path / "ours")(IDS), expected)

    reference.save_pretrained(tmp_path / "theirs")
    assert torch.equal(from_peft(base, tmp_path / "theirs")(IDS), expected)
    assert torch.equal(base(IDS), model(input_ids=IDS, use_cache=False).logits)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_saved_as_an_update_of_the_original_base(rslora, tmp_path):
    model = tiny_model("qwen2")
    program = gt.capture(model).apply(LoRA(rank=4, alpha=8, init="pissa", rslora=rslora))
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    to_peft(program, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(logits(theirs, IDS), program(IDS), atol=1e-4, rtol=1e-4)
    ours = from_peft(gt.capture(model), tmp_path)
    torch.testing.assert_close(ours(IDS), program(IDS), atol=1e-4, rtol=1e-4)


def test_one_of_several_adapters_is_saved_and_loaded_beside_another(tmp_path):
    base = gt.capture(tiny_model("qwen2"))
    both = base.apply(LoRA(rank=4, targets=["q_proj"], adapter="a")).apply(
        DoRA(rank=2, targets=["q_proj", "v_proj"], adapter="b")
    )
    with torch.no_grad():
        for parameter in both.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with pytest.raises(gt.UserError, match="none of a, b"):
        to_peft(both, tmp_path / "a")
    to_peft(both, tmp_path / "a", adapter="a")
    to_peft(both, tmp_path / "b", adapter="b")
    assert all(".b." not in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    again = from_peft(base, tmp_path / "a", adapter="first")
    again = from_peft(again, tmp_path / "b", adapter="second")
    assert torch.equal(again(IDS), both(IDS))


def test_adapter_for_another_base_is_refused(tmp_path):
    to_peft(gt.capture(tiny_model("llama")).apply(LoRA(rank=4)), tmp_path)
    other = gt.capture(tiny_model("llama", seed=1))  # of the same shapes
    with pytest.raises(gt.UserError, match="was trained on .*check_base=False"):
        from_peft(other, tmp_path)
    from_peft(other, tmp_path, check_base=False)
    with pytest.raises(gt.UserError, match="was trained on"):
        from_peft(gt.capture(tiny_model("phi3")), tmp_path)
    with pytest.raises(gt.UserError, match="matches no site"):
        from_peft(gt.capture(tiny_model("phi3")), tmp_path, check_base=False)


def test_dtype_of_the_base_does_not_matter_to_the_record(tmp_path):
    model = tiny_model("llama").bfloat16()
    to_peft(gt.capture(model).apply(LoRA(rank=4)), tmp_path)
    from_peft(gt.capture(copy.deepcopy(model).float()), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_lora_has_not_is_refused(change, message, tmp_path):
    base = gt.capture(tiny_model("llama"))
    to_peft(base.apply(LoRA(rank=4)), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(gt.UserError, match=message):
        from_peft(base, tmp_path)


def test_missing_files_and_adapters_are_refused(tmp_path):
    base = gt.capture(tiny_model("llama"))
    with pytest.raises(gt.UserError, match="no adapter_config.json"):
        from_peft(base, tmp_path)
    with pytest.raises(gt.UserError, match="no adapter"):
        to_peft(base, tmp_path)
