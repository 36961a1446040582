"""Every name that the catalogue's files stand for is a config that can be trained."""

import re
from pathlib import Path

import pytest
import torch

from graphtune.capture import capture
from graphtune.config import SFTConfig, catalogue, load_config, models, techniques, validate
from graphtune.models.families import published_config
from graphtune.passes import registry
from graphtune.recipes import empty_model, make_passes

DOCS = Path(__file__).parents[1] / "docs"
TRAINS = {"full": r".", "qat": r".", "dora": r"lora_|magnitude", "qdora": r"lora_|magnitude"}


def read(name: str) -> SFTConfig:
    return validate(load_config(name), SFTConfig, registry)


def test_names_stand_for_few_files() -> None:
    assert len(catalogue()) < 60 < len(models()) * len(techniques())


@pytest.mark.parametrize("technique", techniques())
@pytest.mark.parametrize("model", models())
def test_every_model_goes_with_every_technique(model: str, technique: str) -> None:
    config = read(f"{model}_{technique}")
    assert config.output_dir == f"runs/{model}_{technique}"
    assert config.model.id == read(f"{model}_full").model.id
    assert [one.name for one in make_passes(config.passes)]


@pytest.mark.parametrize("model", models())
def test_every_model_has_published_shapes(model: str) -> None:
    assert published_config(read(f"{model}_lora").model.id) is not None


def captured(model: str, technique: str) -> None:
    config = read(f"{model}_{technique}")
    shapes = published_config(config.model.id)
    base = capture(empty_model(config.model, torch.device("cpu"), shapes))
    program = base.apply(*make_passes(config.passes))
    trained = [name for name, p in program.named_parameters() if p.requires_grad]
    pattern = TRAINS.get(technique, r"[._]lora_[AB]\.")
    assert trained and all(re.search(pattern, name) for name in trained)
    assert all(p.is_meta for p in program.parameters())


def test_a_small_model_is_captured() -> None:
    captured("smollm2/135M", "lora")


@pytest.mark.slow
@pytest.mark.parametrize("technique", techniques())
def test_every_technique_is_applied(technique: str) -> None:
    captured("smollm2/135M", technique)


@pytest.mark.slow
@pytest.mark.parametrize("model", models())
def test_every_model_is_captured(model: str) -> None:
    captured(model, "lora")


def test_the_documents_name_what_exists() -> None:
    families = {model.partition("/")[0] for model in models()}
    for document in ("from_torchtune.md", "configs.md", "command_line.md"):
        text = (DOCS / document).read_text(encoding="utf-8")
        names = set(re.findall(rf"(?<![\w/])(?:{'|'.join(families)})/[\w-]+(?![\w./-])", text))
        for name in names:
            read(f"{name}_lora" if name in models() else name)


def test_the_table_has_every_file_of_torchtune() -> None:
    text = (DOCS / "from_torchtune.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    theirs = [name for row in rows for name in re.findall(r"`([^`]+\.yaml)`", row)]
    assert len(theirs) == len(set(theirs)) == 198
