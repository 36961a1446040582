"""Runs with other passes than LoRA: what is trained is saved, and comes back."""

import copy
import re
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import graphtune as gt
from graphtune.cli import main
from graphtune.recipes import load_run, make_passes
from tests.oracles.models import random_ids, tiny_model

DOCS = Path(__file__).parents[2] / "docs" / "passes" / "your_own_pass.md"
IDS = random_ids(2, 9)


def graphtune(*argv):
    """Run the command line; its exit code."""
    try:
        main([str(word) for word in argv])
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize(
    "passes",
    [
        {"qlora": {"rank": 4}},
        pytest.param({"quantize": {}, "dora": {"rank": 4}}, marks=pytest.mark.slow),
    ],
)
def test_quantized_runs_save_adapters_of_the_original_base(
    passes, config, write, tmp_path, model_folder
):
    config["passes"] = passes
    assert graphtune("train", write(config)) == 0
    run = tmp_path / "run"
    program, _ = load_run(run)
    assert "quantize" in [row.name for row in program.ledger]
    merged_base, _ = load_run(run, quantized=False)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), run / "adapter").eval()
    assert torch.equal(merged_base.eval()(IDS), theirs(IDS).logits)
    assert graphtune("export", run, "--to", "hf") == 0
    merged = AutoModelForCausalLM.from_pretrained(run / "hf").eval()
    torch.testing.assert_close(merged(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_adapters_beside_full_weights_are_saved_by_name(config, write, tmp_path):
    config["passes"] = {"lora": {"rank": 4}, "full": {"targets": ["model.norm"]}}
    config["parameter_groups"] = [{"parameters": ["*.lora_B.*"], "lr_ratio": 4}]
    assert graphtune("train", write(config)) == 0
    run = tmp_path / "run"
    assert not (run / "adapter").exists()
    tuned, base = load_run(run)[0], load_run(run, tuned=False)[0]
    name = "model.norm.weight"
    assert not torch.equal(tuned.get_parameter(name), base.get_parameter(name))
    assert graphtune("export", run, "--to", "hf") == 0
    merged = AutoModelForCausalLM.from_pretrained(run / "hf").eval()
    torch.testing.assert_close(merged(IDS).logits, tuned.eval()(IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameter_groups": [{"parameters": ["*.norm.*"]}]}, "parameter_groups[0].parameters"),
        ({"passes": {"lora": {"layers": ["1..9"]}}}, "passes.lora.layers"),
        ({"passes": {"lora": {"targets": [{"sites": "q_proj", "rnk": 1}]}}}, "no option `rnk`"),
        ({"passes": {"quantize": {"format": "int3"}}}, "passes.quantize.format"),
        ({"passes": {"qlora": {"rank": 999}}}, "passes.lora.rank=999"),
    ],
)
def test_bad_options_end_in_one_line(change, message, config, write, capsys):
    config |= change
    assert graphtune("train", write(config)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error


@pytest.fixture
def documented_pass(tmp_path, monkeypatch):
    """The pass that the documentation writes, as a module that Python finds."""
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    (tmp_path / "my_passes.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_passes.AttentionBias"
    sys.modules.pop("my_passes", None)


def test_the_documented_pass_does_what_it_says(documented_pass):
    (one,) = make_passes({documented_pass: {"layers": [1], "std": 0.5}})
    model = tiny_model("llama")
    program = gt.capture(model).apply(one)
    attention = model.model.layers[1].self_attn
    bias = program.get_parameter("model.layers.1.self_attn.output_bias")
    assert {n for n, p in program.named_parameters() if p.requires_grad} == {
        "model.layers.1.self_attn.output_bias"
    }
    # Heads come out as (batch, seq, heads * width), in front of o_proj.
    attention.o_proj.register_forward_pre_hook(lambda _, args: (args[0] + bias.flatten(),))
    assert torch.equal(program(IDS), model(input_ids=IDS, use_cache=False).logits)
    assert "attention_bias" in program.tree()


def test_the_documented_pass_trains_from_a_config(documented_pass, config, write, tmp_path, capsys):
    config["passes"] = {documented_pass: {"layers": [0, 1]}}
    path = write(config)
    assert graphtune("inspect", path) == 0
    assert "attention_bias" in capsys.readouterr().out
    assert graphtune("train", path) == 0
    tuned, base = load_run(tmp_path / "run")[0], load_run(tmp_path / "run", tuned=False)[0]
    assert not torch.equal(tuned(IDS), base(IDS))
    assert graphtune("export", tmp_path / "run", "--to", "hf") == 2
    assert "attention_bias" in capsys.readouterr().err
