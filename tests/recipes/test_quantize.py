"""Runs that train to be quantized, and `graphtune quantize`: from the config to what is read."""

import json

import pytest
import torch
from omegaconf import OmegaConf

import graphtune as gt
from graphtune.cli import main
from graphtune.config import load_config
from graphtune.errors import UserError
from graphtune.passes import QAT, Convert, Merge
from graphtune.passes.qat import ENABLED
from graphtune.recipes import load_run
from graphtune.recipes.quantize import config_of, quantize
from graphtune.recipes.sft import run as train
from tests.oracles.models import random_ids

IDS = random_ids(2, 9) % 64
FOUR = {"scheme": "8da4w", "group_size": 16}


def start(config, **changes):
    return train(OmegaConf.create({**config, **changes}))


def call(*words):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return stopped.value.code or 0


@pytest.mark.parametrize("weights", ["effective", "base"])
def test_a_lora_run_is_read_as_it_was_trained(quick, weights):
    quick["passes"]["qat"] = {**FOUR, "weights": weights}
    run = start(quick, max_steps=3)
    assert (run.adapter_dir / "adapter_model.safetensors").is_file()
    program, _ = load_run(run.folder)
    assert [row.name for row in program.ledger][-1] == "qat"
    integers = program.apply(Convert())
    assert torch.equal(integers.eval()(IDS), program.eval()(IDS))
    plain, _ = load_run(run.folder, aware=False)
    assert not torch.allclose(plain.eval()(IDS), program(IDS), atol=1e-4)
    if weights == "effective":
        other = plain.apply(Merge(), QAT(**FOUR), Convert())
        assert torch.equal(other.eval()(IDS), integers(IDS))


def test_a_full_run_saves_a_plain_model(quick):
    run = start(quick, passes={"qat": FOUR}, max_steps=2)
    saved, _ = load_run(run.folder, aware=False)
    program, _ = load_run(run.folder)
    assert torch.equal(program.eval()(IDS), saved.apply(QAT(**FOUR)).eval()(IDS))


def test_ranges_are_saved_and_read(quick):
    qat = {"scheme": "int8_static", "observe_steps": 2}
    run = start(quick, passes={"lora": {"rank": 2}, "qat": qat}, max_steps=3)
    program, _ = load_run(run.folder)
    ranges = [b for name, b in program.named_buffers() if name.endswith("observed_input")]
    assert len(ranges) == 14 and all(one[1] > one[0] for one in ranges)
    assert torch.equal(program.apply(Convert()).eval()(IDS), program.eval()(IDS))
    plain, _ = load_run(run.folder, aware=False)
    assert not any(row.name == "qat" for row in plain.ledger)


def test_begins_late_and_goes_on_exactly(quick, tmp_path):
    quick["passes"]["qat"] = {**FOUR, "enabled_from_step": 3}
    quick |= {"max_steps": 5, "checkpoint": {"every_steps": 2, "keep_last": None}}
    whole = start(quick, output_dir=str(tmp_path / "whole"))
    plain = start(
        {**quick, "passes": {"lora": quick["passes"]["lora"]}}, output_dir=str(tmp_path / "plain")
    )
    first, other = ([row["loss"] for row in one.metrics()] for one in (whole, plain))
    assert first[:3] == other[:3] and first[3] != other[3]
    for step in (2, 4):  # before it begins, and after
        checkpoint = next((whole.folder / "checkpoints").glob(f"*{step}*"))
        again = start(quick, output_dir=str(tmp_path / f"from{step}"), resume=str(checkpoint))
        assert [row["loss"] for row in again.metrics()] == first[step:]
        program, _ = load_run(again.folder)
        expected, _ = load_run(whole.folder)
        assert torch.equal(program.eval()(IDS), expected.eval()(IDS))
        assert ENABLED not in dict(program.named_buffers())


def test_a_run_that_ended_before_it_began(quick, tmp_path):
    quick["passes"]["qat"] = {**FOUR, "enabled_from_step": 9}
    run = start(quick, max_steps=2)
    program, _ = load_run(run.folder)
    assert not any(row.name == "qat" for row in program.ledger)
    assert call("export", run.folder, "--to", "executorch", "-o", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    prose = {"_component_": "graphtune.data.pydoc_topics", "limit": 2}
    overrides = [f"dataset_val={json.dumps(prose)}"]
    with pytest.raises(UserError, match="--scheme"):
        quantize(str(run.folder), tmp_path / "out", None, overrides=overrides)


def test_quantize_a_model(model_folder, tmp_path, capsys):
    small = ["dataset_val.limit=2", "loader.length=64"]
    words = ["--scheme", "8da4w", "--group-size", "16", "--targets", "all-linear"]
    words += ["--targets", "*embed_tokens=int8", "--device", "cpu"]
    out = tmp_path / "out"
    assert call("quantize", model_folder, *small, "-o", out, *words) == 0
    printed = capsys.readouterr().out
    assert "before" in printed and "heldout perplexity" in printed
    program, tokenizer = load_run(out)
    rules = ("all-linear", {"sites": "*embed_tokens", "scheme": "int8"})
    expected = gt.capture(gt.load_model(model_folder)).apply(
        QAT(group_size=16, targets=rules), Convert()
    )
    assert torch.equal(program.eval()(IDS), expected.eval()(IDS))
    assert call("generate", out, "What is 1 and 2?", "--max-new-tokens", 3) == 0
    capsys.readouterr()
    assert call("evaluate", out, "--json") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    row = next(line for line in printed.splitlines() if line.startswith("heldout loss"))
    before, after = map(float, row.split()[-2:])
    assert figures["before"]["heldout_loss"] == pytest.approx(before, abs=1e-4)
    assert figures["after"]["heldout_loss"] == pytest.approx(after, abs=1e-4)
    assert call("quantize", model_folder, "-o", out, *words) == 2  # nothing is overwritten


def test_quantize_a_run_by_each_method(quick, tmp_path):
    run = start(quick, max_steps=2)
    prose = {"_component_": "graphtune.data.pydoc_topics", "limit": 2}
    overrides = [f"dataset_val={json.dumps(prose)}", "device=cpu"]
    qat, seen = QAT("int4", group_size=16), []
    for method in ("rtn", "hqq", "awq"):
        figures = quantize(
            str(run.folder),
            tmp_path / method,
            qat,
            method=method,
            batches=2,
            overrides=overrides,
        )
        program, _ = load_run(tmp_path / method)
        seen.append(program.eval()(IDS))
        assert figures["after"]["heldout_loss"] != figures["before"]["heldout_loss"]
    assert not any(torch.equal(a, b) for a, b in [seen[:2], seen[1:], seen[::2]])
    with pytest.raises(UserError, match="CUDA"):
        quantize(str(run.folder), tmp_path / "gptq", qat, method="gptq")


def test_quantize_a_run_as_it_was_trained(quick, tmp_path):
    quick["passes"]["qat"] = FOUR
    run = start(quick, max_steps=2)
    prose = {"_component_": "graphtune.data.pydoc_topics", "limit": 2}
    figures = quantize(
        str(run.folder), tmp_path / "out", None, overrides=[f"dataset_val={json.dumps(prose)}"]
    )
    assert figures["before"] == figures["after"]  # it was measured with the rounding
    program, _ = load_run(tmp_path / "out")
    expected, _ = load_run(run.folder)
    assert torch.equal(program.eval()(IDS), expected.eval()(IDS))
    with pytest.raises(UserError, match="quantized already"):
        quantize(str(tmp_path / "out"), tmp_path / "again", None)


def test_bad_words(model_folder, tmp_path):
    out = tmp_path / "out"
    assert call("quantize", model_folder, "-o", out, "--scheme", "int3") == 2
    assert call("quantize", model_folder, "-o", out, "--scheme", "int4", "--method", "x") == 2
    assert call("quantize", model_folder, "-o", out, "--scheme", "int4", "--format", "nf4") == 2
    assert not out.exists()
    config = config_of(str(model_folder))
    assert config.model.id == str(model_folder) and load_config("smollm2/135M_qat_lora").passes
