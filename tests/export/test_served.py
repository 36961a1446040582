"""pt2, aoti and onnx files run without graphtune, for any batch, length and padding."""

import subprocess
import sys

import pytest
import torch

import graphtune as gt
from graphtune.errors import UserError
from graphtune.export import to_aoti, to_onnx, to_pt2
from graphtune.export.artifact import read_checks, read_manifest
from graphtune.passes import Quantize
from tests.oracles.models import random_ids, tiny_gpt2, tiny_model

CASES = [(1, 1, 0), (2, 9, 3), (3, 40, 0)]  # batch, length, padding in front of the first row


def inputs(batch, length, padding):
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :padding] = 0
    return random_ids(batch, length), mask


def expected(model, ids, mask):
    """transformers, told where it is in each row, as its `generate` does."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model.eval()(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
    return out.logits[mask.bool()]


def without_graphtune(code, folder):
    """Run code in a process that cannot import graphtune, over the cases' inputs."""
    for i, case in enumerate(CASES):
        torch.save(inputs(*case), folder / f"in{i}.pt")
    program = f"""
import sys, torch
sys.modules["graphtune"] = None
{code}
for i in range({len(CASES)}):
    torch.save(run(*torch.load("in%d.pt" % i, weights_only=True)), "out%d.pt" % i)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folder)
    return [torch.load(folder / f"out{i}.pt", weights_only=True) for i in range(len(CASES))]


def model_of(family):
    return tiny_gpt2() if family == "gpt2" else tiny_model(family)


def assert_agree(found, model):
    for logits, case in zip(found, CASES, strict=True):
        ids, mask = inputs(*case)
        theirs = expected(model, ids, mask)
        torch.testing.assert_close(logits[mask.bool()], theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_torch_alone_runs_a_pt2_file(family, tmp_path):
    model = model_of(family)
    folder = to_pt2(gt.capture(model), tmp_path / "out")
    code = f"run = torch.export.load({str(folder / 'model.pt2')!r}).module()"
    assert_agree(without_graphtune(code, tmp_path), model)
    assert [check.max_abs_diff for check in read_checks(folder)] == [0, 0, 0]


def test_operators_of_graphtune_are_refused(tmp_path):
    program = gt.capture(tiny_model("llama")).apply(Quantize(format="int8"))
    with pytest.raises(UserError, match="graphtune.dequantize_int8.*Merge"):
        to_pt2(program, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # compiles C++
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_torch_alone_runs_an_aoti_package(family, tmp_path):
    model = model_of(family)
    folder = to_aoti(gt.capture(model), tmp_path / "out")
    package = str(folder / "model.pt2")
    code = f"import torch._inductor; run = torch._inductor.aoti_load_package({package!r})"
    assert_agree(without_graphtune(code, tmp_path), model)


@pytest.mark.parametrize("family", [pytest.param("qwen2", marks=pytest.mark.slow), "gpt2"])
def test_onnxruntime_runs_an_onnx_file(family, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    model = model_of(family)
    folder = to_onnx(gt.capture(model), tmp_path / "out")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    found = []
    for case in CASES:
        ids, mask = inputs(*case)
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        found.append(torch.from_numpy(session.run(["logits"], feeds)[0]))
    assert_agree(found, model)
    assert {"model.onnx", "model.onnx.data"} <= read_manifest(folder)["files"].keys()
    assert {"onnx", "onnxruntime"} <= read_manifest(folder)["versions"].keys()


def test_without_onnxruntime_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"needs onnx .*pip install 'graphtune\[onnx\]'"):
        to_onnx(gt.capture(tiny_model("llama")), tmp_path / "out")


def test_onnx_files_are_float32(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match="bfloat16.*dtype=float32"):
        to_onnx(gt.capture(tiny_model("llama").bfloat16()), tmp_path / "out")


def test_a_program_without_weights_is_refused(tmp_path):
    with torch.device("meta"):
        program = gt.capture(tiny_model("llama"))
    with pytest.raises(UserError, match="no weights yet"):
        to_pt2(program, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
