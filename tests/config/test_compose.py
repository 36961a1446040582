"""Configs laid over one another, and the names that put them together."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from graphtune.config import catalogue, compose, config_text, load_config, models, techniques
from graphtune.config import validate as validate_config
from graphtune.errors import UserError
from graphtune.passes import registry

BASE = """\
recipe: sft
loader: {batch_size: 2, length: 64}
optimizer: {_component_: torch.optim.AdamW, lr: 1e-5, fused: true}
tags: [a, b]
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "base": BASE,
        "acme/1B": "defaults: [base]\nmodel: {id: acme/1b}\nloader: {length: 128}\n",
        "acme/1B_x": "recipe: other\n",
        "techniques/lora": "passes: {lora: {rank: 8}}\noptimizer: {lr: 3e-4}\n",
        "techniques/quantize": "passes: {quantize: {}}\n",
    }
    for name, text in files.items():
        path = tmp_path / "shelf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(compose, "files", lambda package: tmp_path / "shelf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def get(name: str, *overrides: str) -> object:
    return OmegaConf.to_container(load_config(name, overrides))


def test_a_config_is_laid_over_its_defaults(shelf: Path) -> None:
    assert get("acme/1B") == {
        "recipe": "sft",
        "model": {"id": "acme/1b"},
        "loader": {"batch_size": 2, "length": 128},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-5, "fused": True},
        "tags": ["a", "b"],
    }


def test_a_technique_goes_behind_a_models_name(shelf: Path) -> None:
    config = load_config("acme/1B_quantize_lora")
    assert dict(config.passes) == {"quantize": {}, "lora": {"rank": 8}}
    assert config.optimizer == {"_component_": "torch.optim.AdamW", "lr": 3e-4, "fused": True}
    assert config.output_dir == "runs/acme/1B_quantize_lora"
    assert load_config("acme/1B_x").recipe == "other"  # a file of that name goes first
    assert OmegaConf.create(config_text("acme/1B_lora")) == load_config("acme/1B_lora")


def test_a_file_of_ones_own_may_build_on_the_catalogue(shelf: Path) -> None:
    (shelf / "mine").mkdir()
    (shelf / "mine" / "data.yaml").write_text("dataset: {_component_: a.b, source: x}\n")
    (shelf / "mine" / "run.yaml").write_text(
        "defaults: [acme/1B, techniques/lora, data]\n"
        "optimizer: {_component_: torch.optim.SGD, momentum: 0.9}\n"
        "tags: [c]\n"
    )
    config = load_config("mine/run.yaml", ["passes.lora.rank=4"])
    assert config.passes.lora.rank == 4
    assert config.dataset.source == "x"
    assert config.optimizer == {"_component_": "torch.optim.SGD", "momentum": 0.9}
    assert config.tags == ["c"]
    assert "defaults" not in config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [bas]", "names `bas`.*did you mean `base`"),
        ("defaults: base", "must be a list"),
        ("defaults: [run]", "lead back to itself"),
        ("defaults: [other]", "lead back to itself"),
    ],
)
def test_defaults_that_cannot_be(shelf: Path, text: str, message: str) -> None:
    (shelf / "run.yaml").write_text(text)
    (shelf / "other.yaml").write_text("defaults: [run]")
    with pytest.raises(UserError, match=message):
        load_config("run.yaml")


@pytest.mark.parametrize(
    ("name", "close"),
    [("acme/1B_lorra", "acme/1B_lora"), ("acme/2B", "acme/1B"), ("acme/1B_lora_lorra", "acme/1B")],
)
def test_an_unknown_name_gets_the_closest(shelf: Path, name: str, close: str) -> None:
    with pytest.raises(UserError, match=f"did you mean `{close}"):
        load_config(name)


# --- the catalogue itself -----------------------------------------------------------------------


@pytest.mark.parametrize("technique", techniques())
def test_every_technique_is_valid_with_a_model(technique: str) -> None:
    validate_config(load_config(f"llama3_1/8B_{technique}"), registry=registry)


@pytest.mark.parametrize("model", models())
def test_every_model_is_valid(model: str) -> None:
    config = load_config(f"{model}_lora")
    validate_config(config, registry=registry)
    assert config.model.id


def test_names_stand_for_few_files() -> None:
    assert len(catalogue()) < 60
