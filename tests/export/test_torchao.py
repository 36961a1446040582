"""transformers loads what torchao quantized, and computes what torchao itself does."""

import copy

import pytest
import torch
from safetensors import safe_open
from torchao.quantization import (
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import graphtune as gt
from graphtune.errors import UserError
from graphtune.export import to_torchao
from graphtune.export.artifact import read_checks, read_manifest
from graphtune.passes import LoRA
from tests.oracles.models import random_ids, tiny_model

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {"llama": LlamaConfig(**SHAPE), "qwen3": Qwen3Config(**SHAPE, head_dim=16)}
THEIRS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


def tiny(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() == 2 else 1)
    return model


@pytest.mark.parametrize("format", THEIRS)
@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_computes_what_torchao_does(family, format, tmp_path):
    model = tiny(family)
    folder = to_torchao(gt.capture(model), tmp_path / "out", format=format)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    reference = copy.deepcopy(model).eval()
    quantize_(reference.model, THEIRS[format])
    ids = random_ids(2, 9)
    with torch.no_grad():
        found, expected = loaded(ids).logits, reference(ids).logits
        plain = model.eval()(ids).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, plain, atol=1e-3)
    same, loss = read_checks(folder)
    assert same.max_abs_diff < same.limit
    assert loss.limit is None and loss.max_abs_diff > 1e-3
    assert read_manifest(folder)["format"] == format
    with safe_open(folder / "model.safetensors", "pt") as file:
        name = next(name for name in file.keys() if "q_proj" in name and "qdata" in name)  # noqa: SIM118
        assert file.get_tensor(name).dtype == torch.int8
    assert not any("unquantized" in path.name for path in folder.iterdir())


def test_bad_input_is_refused(tmp_path):
    program = gt.capture(tiny_model("llama"))  # 48 wide inside
    with pytest.raises(UserError, match=r"multiple of 32 .*down_proj.weight has 48; choose int8"):
        to_torchao(program, tmp_path / "out", format="int4")
    with pytest.raises(UserError, match="`format=int88`.*did you mean `int8`"):
        to_torchao(program, tmp_path / "out", format="int88")
    with pytest.raises(UserError, match="adapters that are not merged"):
        to_torchao(program.apply(LoRA(rank=2)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
