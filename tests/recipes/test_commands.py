"""Commands on models: merge and quantize; oracles are PEFT and the library's own Python."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import graphtune as gt
from graphtune.cli import main
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
