"""`graphtune export` of runs that trained adapters: what is written is what was trained."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import graphtune as gt
from graphtune.cli import main
from graphtune.recipes import load_run
from tests.oracles.models import random_ids

IDS = random_ids(2, 9)


def graphtune(*argv):
    try:
        main([str(word) for word in argv])
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def run(quick, write, tmp_path):
    def train(passes):
        quick["passes"] = passes
        assert graphtune("train", write(quick)) == 0
        return tmp_path / "run"

    return train


@pytest.mark.parametrize(
    "passes",
    [
        {"qlora": {"rank": 4}},
        pytest.param({"lora": {"rank": 4}}, marks=pytest.mark.slow),
        pytest.param({"dora": {"rank": 4}}, marks=pytest.mark.slow),
    ],
)
def test_a_tuned_model_goes_to_several_targets(passes, run, capsys):
    folder = run(passes)
    capsys.readouterr()
    assert graphtune("export", folder, "--to", "hf,gguf:q8_0,peft") == 0
    said = capsys.readouterr()
    assert "merged the adapter default into the weights" in said.err
    assert [line.split()[-1] for line in said.out.splitlines() if line.startswith("saved")] == [
        str(folder / name) for name in ("hf", "gguf", "peft")
    ]
    tuned = load_run(folder, quantized=False)[0].eval()
    base = load_run(folder, tuned=False)[0].eval()
    with torch.no_grad():
        expected = tuned(IDS)
        assert not torch.allclose(base(IDS), expected, atol=1e-2)
        hf = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()(IDS).logits
        torch.testing.assert_close(hf, expected, rtol=0, atol=1e-5)
        lossy = gt.load_model(folder / "gguf" / "model.gguf").eval()(input_ids=IDS).logits
        torch.testing.assert_close(lossy, expected, rtol=0, atol=0.1)
    for name in ("hf", "gguf", "peft"):
        manifest = json.loads((folder / name / "manifest.json").read_text())
        assert manifest["source"]["run"] == str(folder)
        assert manifest["checks"][0]["max_abs_diff"] < manifest["checks"][0]["limit"]

    assert graphtune("export", folder, "--to", "hf") == 2
    assert "is not empty" in capsys.readouterr().err
    assert graphtune("export", folder, "--to", "hf", "--overwrite") == 0


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("guff", "there is no target 'guff'; did you mean `gguf`?"),
        ("hf,hf", "hf is named twice"),
        ("onnx:fp16", "onnx has no formats; give onnx alone"),
    ],
)
def test_bad_targets_are_refused_before_anything_is_loaded(to, message, tmp_path, capsys):
    assert graphtune("export", tmp_path / "no run", "--to", to) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_devices_get_an_adapter_in_a_file_of_its_own(run, capsys):
    folder = run({"lora": {"rank": 4}})
    options = ("--adapter-file", "--max-seq-len", 32, "--prefill", 8)
    assert graphtune("export", folder, "--to", "executorch", *options) == 0
    said = capsys.readouterr()
    assert "merged" not in said.err
    manifest = json.loads((folder / "executorch" / "manifest.json").read_text())
    assert {"model.pte", "adapter.ptd"} <= manifest["files"].keys()
    assert all(check["max_abs_diff"] < 1e-4 for check in manifest["checks"])
