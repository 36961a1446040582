"""Commands on models and configs; oracles are PEFT, transformers, and the library's own Python."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import graphtune as gt
from graphtune.cli import main
from graphtune.data import instruct
from graphtune.models import load_tokenizer
from graphtune.passes import Quantize
from tests.oracles.models import random_ids

Call = Callable[..., tuple[int | str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: object) -> tuple[int | str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out + captured.err

    return run


@pytest.fixture
def adapter(model_folder: Path, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merge_an_adapter(call: Call, adapter: Path, model_folder: Path, tmp_path: Path) -> None:
    code, out = call("merge", adapter, "-o", tmp_path / "merged")
    assert code == 0 and f"saved {tmp_path / 'merged'}" in out, out
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = random_ids(2, 9) % 64
    torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_merge_needs_a_base(call: Call, adapter: Path, model_folder: Path, tmp_path: Path) -> None:
    config = adapter / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace(str(model_folder), ""))
    code, out = call("merge", adapter, "-o", tmp_path / "merged")
    assert code == 2 and "--base" in out
    assert call("merge", adapter, "-o", tmp_path / "merged", "--base", model_folder)[0] == 0


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantize(call: Call, model_folder: Path, tmp_path: Path, format: str) -> None:
    code, out = call(
        "quantize", model_folder, "-o", tmp_path / "model.gt", "--format", format, "--device", "cpu"
    )
    assert code == 0, out
    program = gt.Program.load(tmp_path / "model.gt")
    expected = gt.capture(gt.load_model(model_folder)).apply(Quantize(format=format))
    ids = random_ids(2, 9) % 64
    assert torch.equal(program.eval()(ids), expected.eval()(ids))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quantize", "{model}", "-o", "x.gt", "--format", "nf5"), "must be one of nf4"),
        (("quantize", "{model}x", "-o", "x.gt"), "does not exist"),
        (("merge", "{model}", "-o", "x"), "is not a run"),
        (("download", "some/model"), "cannot be reached"),
    ],
)
def test_bad_input(call: Call, model_folder: Path, words: tuple[str, ...], message: str) -> None:
    code, out = call(*(word.format(model=model_folder) for word in words))
    assert code == 2
    assert message in out and len(out.splitlines()) == 1


# --- evaluate, bench, validate ------------------------------------------------------------------


def parsed(out: str) -> Any:
    """The JSON on stdout, which comes before what was on stderr."""
    return json.loads(out.splitlines()[0])


def test_evaluate_measures_what_eager_does(call: Call, config, write, model_folder: Path) -> None:
    """On one answer a row, against transformers' own loss."""
    config["loader"] = {"batch_size": 1, "length": 64}
    code, out = call("evaluate", write(config), "--json", "~retention")
    assert code == 0, out
    figures = parsed(out)["model"]
    assert figures.keys() == {"heldout_loss", "heldout_perplexity"}
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    loss = count = 0
    for example in instruct(
        load_tokenizer(model_folder), source=config["dataset_val"]["source"], max_length=64
    ):
        labels = torch.tensor([list(example["labels"])]).long()
        learned = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            found = model(torch.tensor([list(example["input_ids"])]).long(), labels=labels).loss
        loss, count = loss + float(found) * learned, count + learned
    assert figures["heldout_loss"] == pytest.approx(loss / count, abs=1e-5)
    assert figures["heldout_perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)


@pytest.mark.parametrize(
    "passes",
    [
        {"full": {}},
        pytest.param({"lora": {"rank": 4}}, marks=pytest.mark.slow),
        {"qlora": {"rank": 4}},
    ],
)
def test_evaluate_a_run_as_training_did(call: Call, config, write, passes) -> None:
    config["passes"] = passes
    assert call("train", write(config))[0] == 0
    summary = json.loads((Path(config["output_dir"]) / "summary.json").read_text())
    code, out = call("evaluate", config["output_dir"], "--json")
    assert code == 0, out
    figures = parsed(out)
    for when in ("before", "after"):
        assert figures[when]["heldout_loss"] == pytest.approx(
            summary[when]["heldout_loss"], abs=1e-5
        )
        assert figures[when]["retention_perplexity"] == pytest.approx(
            summary[when]["retention_perplexity"], rel=1e-4
        )
    code, out = call("evaluate", config["output_dir"], "~retention")
    assert out.splitlines()[0].split() == ["before", "after"]
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["heldout", "heldout"]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"loader": {"batch_size": 2, "length": 16, "mode": "padding_free"}},
        {"passes": {"qlora": {"rank": 2}}, "gradient_accumulation_steps": 3, "ema_decay": 0.9},
        {"optimizer_in_backward": True, "clip_grad_norm": None},
        {"lr_scheduler": {"name": "wsd", "warmup_steps": 100}},
    ],
)
def test_bench_takes_the_steps_of_the_config(call: Call, config, write, extra) -> None:
    config |= {"dataset": {"_component_": "text", "source": "not/there"}} | extra
    code, out = call("bench", write(config), "--steps", "3", "--json")
    assert code == 0, out
    figures = parsed(out)
    rows, length = config["loader"]["batch_size"], config["loader"]["length"]
    flat = config["loader"]["mode"] == "padding_free"
    assert figures["batch"] == ([1, rows * length] if flat else [rows, length])
    tokens = rows * length * config.get("gradient_accumulation_steps", 1)
    assert figures["tokens_per_s"] == pytest.approx(tokens / figures["step_s"])
    assert 0 < figures["fastest_step_s"] <= figures["step_s"] <= figures["slowest_step_s"]
    assert figures["tflops_per_s"] > 0 and figures["peak_memory_bytes"] > 2**20
    assert not Path(config["output_dir"]).exists()
    assert "random weights" in call("bench", write(config), "--steps", "1")[1]


def test_bench_needs_no_weights(call: Call, config, write, model_folder: Path, tmp_path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model_folder / "config.json").read_text())
    config["model"] = {"id": str(bare)}
    code, out = call("bench", write(config), "--steps", "1")
    assert code == 0, out


def test_validate_looks_at_everything(call: Call, config, write) -> None:
    code, out = call("validate", write(config), "--json")
    assert code == 0, out
    names = [check["name"] for check in parsed(out)["checks"]]
    assert names[:6] == ["config", "components", "output", "model", "tokenizer", "passes"]
    assert names[6:] == ["optimizer", "schedule", "dataset", "dataset_val", "retention"]
    assert all(check["checked"] for check in parsed(out)["checks"])
    assert "valid, but 1 not checked" in call("validate", write(config), "--no-data")[1]
    assert not Path(config["output_dir"]).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["passes.lora.targets=[q_prj]"], "nearest: q_proj"),
        (["~passes.lora", "passes.freeze={}"], "nothing to train"),
        (["model.id=not/there/at/all"], "does not exist"),
        (["loader.length=4096"], "more than the 128 positions"),
        (["dataset.source=not_there.jsonl"], "not_there.jsonl"),
        (["dataset_val.prompt_column=question"], "question"),
        (["optimizer.lr=-1"], "Invalid learning rate"),
        (["lr_scheduler.min_ratio=2"], "`lr_scheduler.min_ratio=2.0`"),
        (["optimizer=nothing"], "no such name"),
    ],
)
def test_validate_finds_what_is_wrong(call: Call, config, write, words, message) -> None:
    code, out = call("validate", write(config), *words)
    assert code == 2
    assert message in out.splitlines()[-1]


def test_a_published_model_is_looked_at_without_the_hub(call: Call, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    note = "its config cannot be read here"
    code, out = call("inspect", "smollm2/135M_lora")
    assert code == 0 and note in out and "0-29 x30" in out, out
    code, out = call("validate", "smollm2/135M_lora")
    assert code == 0 and out.endswith("valid, but 3 not checked\n"), out
    code, out = call("train", "smollm2/135M_lora")  # never for training
    assert code == 2 and "cannot be reached" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "{run}", "model.id=other"], "give a config in the run's place"),
        (["evaluate", "{model}"], "is not a run"),
        (["evaluate", "{config}", "~dataset_val", "~retention"], "set `dataset_val`"),
        (["bench", "{config}", "passes.lora.targets=[q_prj]"], "nearest: q_proj"),
    ],
)
def test_bad_input_to_measure(call: Call, config, write, model_folder, words, message) -> None:
    run = Path(config["output_dir"])
    run.mkdir()
    path = write(config)
    (run / "config.yaml").write_text(Path(path).read_text())
    places = {"run": run, "model": model_folder, "config": path}
    code, out = call(*(word.format(**places) for word in words))
    assert code == 2 and message in out.splitlines()[-1], out
