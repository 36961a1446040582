"""Runs on conversations with images, against transformers' models, PEFT, and runs on text."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

from graphtune.recipes import sft
from tests.oracles.command_line import (
    assert_same_run,
    changed,
    graphtune,
    metrics,
    write_config,
)
from tests.oracles.vision_models import (
    CAPTURED,
    TEMPLATE,
    loss_of,
    picture,
    random_model,
    theirs,
)
from tests.recipes.test_resume import stopped_at

LANGUAGE = {  # where the adapters are; in PEFT an expression, which must match all of a name
    "gemma3": r"re:.*language_model.*_proj",
    "smolvlm": r"re:.*text_model.*_proj",
}


@functools.cache
def _processor(family: str) -> Any:
    return CAPTURED[family](TEMPLATE)[0]


@pytest.fixture(scope="module", params=["smolvlm", pytest.param("gemma3", marks=pytest.mark.slow)])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(family)
    random_model(CAPTURED[family](TEMPLATE)[1]).save_pretrained(folder)
    _processor(family).save_pretrained(folder)
    return folder


@pytest.fixture
def config(family: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(
        "graphtune.recipes.reading.load_processor", lambda *_, **__: _processor(family)
    )
    monkeypatch.setattr("graphtune.recipes.job.check_fits", lambda *_, **__: None)
    for i in range(4):
        picture(20 + 8 * i, 30, seed=i)["image"].save(tmp_path / f"{i}.png")
    rows = []
    for i in range(12):
        images = [f"{i % 4}.png", f"{(i + 1) % 4}.png"][: i % 3]
        question = "<image>" * len(images) + f"What is {i}?"
        turns = [("user", question), ("assistant", f"A red fox, {i} of them.")]
        messages = [{"role": role, "content": text} for role, text in turns]
        rows.append({"messages": messages, "images": images})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "_component_": "graphtune.data.chat",
        "source": str(tmp_path / "data.jsonl"),
        "image_dir": str(tmp_path),
    }
    return {
        "recipe": "sft",
        "output_dir": str(tmp_path / "run"),
        "model": {"id": str(folder)},
        "passes": {"lora": {"rank": 4, "alpha": 8, "targets": [LANGUAGE[family]]}},
        "dataset": data,
        "loader": {"batch_size": 3, "length": 192},
        "optimizer": {"lr": 1e-2},
        "lr_scheduler": None,
        "clip_grad_norm": None,
        "max_steps": 5,
        "epochs": 9,
        "compile": False,
    }


def test_a_run_is_that_of_peft(
    config: Any, folder: Path, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[Any] = []
    take_step = sft.take_step

    def step(training: Any, group: Any, run: Any) -> Any:
        if not groups:
            start.update({n: p.detach().clone() for n, p in training.program.named_parameters()})
        groups.append(group)
        return take_step(training, group, run)

    start: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(sft, "take_step", step)
    assert graphtune("train", write_config(tmp_path / "config.yaml", config)) == 0
    images = [int(batch.get("pixel_values", torch.zeros(0)).abs().sum() > 0) for (batch,) in groups]
    assert any(images)

    model = AutoModelForImageTextToText.from_pretrained(folder)
    options = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=LANGUAGE[family].removeprefix("re:")
    )
    reference = peft.get_peft_model(model, options).train()
    trained = {
        name.removeprefix("base_model.model."): p
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for (batch,), row in zip(groups, metrics(tmp_path / "run"), strict=True):
        loss = loss_of(reference, batch)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    fresh = AutoModelForImageTextToText.from_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "run" / "adapter").eval()
    reference.eval()
    (batch,) = groups[0]
    with torch.no_grad():
        found, expected = (one(**theirs(batch)).logits for one in (loaded, reference))
    mask = theirs(batch)["attention_mask"].bool()
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = changed(config, {"checkpoint": {"every_steps": 1}, "loader": {"mode": "packed"}})
    whole = write_config(
        tmp_path / "whole.yaml", changed(busy, {"output_dir": str(tmp_path / "whole")})
    )
    assert graphtune("train", whole) == 0
    path = write_config(tmp_path / "config.yaml", busy)
    stopped_at(monkeypatch, path, 4)
    assert graphtune("train", path, "resume=auto") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_validate_looks_for_images(
    config: Any, family: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"dataset.{key}={config['dataset'][key]}" for key in ("source", "image_dir")]
    targets = f"passes.lora.targets=[{LANGUAGE[family]!r}]"
    words = [f"model.id={folder}", *data, "~dataset.split", "loader.length=192", targets]
    assert graphtune("validate", "vision", *words, f"output_dir={tmp_path / 'none'}") == 0
    assert "images        the model is trained with those of its data" in capsys.readouterr().out


def test_images_that_are_not_wanted(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = (
        r"`dataset`: .*data.jsonl, row 2: messages\[0\].content\[0\]: an image, where text alone"
    )
    del config["dataset"]["image_dir"]
    path = write_config(tmp_path / "config.yaml", changed(config, {"model": {"images": False}}))
    assert graphtune("train", path) == 2
    assert re.search(where, capsys.readouterr().err)


def test_images_for_a_model_of_text(
    config: Any, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = {"lora": {"targets": ["all-linear"]}}
    other = changed(config, {"model": {"id": str(model_folder)}, "passes": passes})
    del other["dataset"]["image_dir"]
    other["loader"]["length"] = 64
    path = write_config(tmp_path / "config.yaml", other)
    for words in ((), ("model.images=true",)):
        assert graphtune("train", path, *words) == 2
        assert "model.id: a model of type 'llama' takes no images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
