"""docs/data.md: every file in it is written, and every config and script run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import PreTrainedTokenizerBase

import graphtune.cli.data  # noqa: F401  (registers itself)
from graphtune.cli import main
from tests.data.test_vision import TEMPLATE, qwen2_vl

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```(\w+)(?: title=\"(.*?)\")?\n(.*?)```", DOCS, re.DOTALL)
CONFIGS = [text for language, _, text in BLOCKS if language == "yaml"]
LINES = "the first line of a text\nanother one\nand more of it\nwhich goes on\n"
TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content }}{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Where the documentation's files lie."""
    monkeypatch.chdir(tmp_path)
    for language, title, text in BLOCKS:
        if language == "json":
            (tmp_path / title).write_text(text)
    (tmp_path / "lines.txt").write_text(LINES)
    (tmp_path / "tools.jinja").write_text(TOOLS)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 30), "red").save(tmp_path / "pictures" / "fox.png")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_each_config_makes_a_data_set(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    config = {"output_dir": "run", "model": {"id": "model"}, **yaml.safe_load(text)}
    parts = [config["dataset"]] if isinstance(config["dataset"], dict) else config["dataset"]
    for name in ("dataset", "dataset_val"):
        if name not in config:
            continue
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"dataset": config[name]}))
        with pytest.raises(SystemExit) as stopped:
            main(["data", "config.yaml", "--json"])
        output = capsys.readouterr()
        assert not stopped.value.code, output.err
        figures: dict[str, Any] = json.loads(output.out)
        assert figures["examples"] and figures["batches"]
        assert figures["skipped"] == (2 if parts[0].get("on_bad_row") else 0)
        if "questions" not in text:
            assert figures["learned"]


def test_every_row_and_every_builder_is_used() -> None:
    sources = {title for language, title, _ in BLOCKS if language == "json"}
    assert all(source in DOCS.replace(f'title="{source}"', "") for source in sources)
    builders = {"alpaca", "instruct", "chat", "text", "preference", "unpaired", "stepwise"}
    named = set(re.findall(r"_component_: graphtune\.data\.(\w+)", "".join(CONFIGS)))
    assert named == builders | {"questions"}


def test_the_scripts_run(folder: Path) -> None:
    processor, _ = qwen2_vl(TEMPLATE)
    names: dict[str, Any] = {"processor": processor}
    for language, _, text in BLOCKS:
        if language == "python":
            exec(text, names)
    assert len(names["dataset"]) == 3
    assert isinstance(names["batch"]["pixel_values"], torch.Tensor)
