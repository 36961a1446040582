"""Metrics reach the trackers, read back by each tracker's own reader."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from graphtune.errors import UserError
from graphtune.training.loggers import LOGGERS, Loggers

STEPS = {1: {"loss": 2.5, "lr": 1e-4}, 2: {"loss": 1.25, "lr": 5e-5}}
CONFIG = {"seed": 3, "model": {"id": "some/model"}}


def write(folder: Path, options: dict[str, Any]) -> None:
    loggers = Loggers(options, folder, CONFIG)
    for step, metrics in STEPS.items():
        loggers.log(step, metrics)
    loggers.close()


def test_stdout_and_others_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    write(tmp_path / "run", {"stdout": None, "tensorboard": {}})
    assert capsys.readouterr().out.splitlines() == [
        "step 1  loss 2.5  lr 0.0001",
        "step 2  loss 1.25  lr 5e-05",
    ]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("loss")} == {1: 2.5, 2: 1.25}


def test_figures_of_ranks_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loggers = Loggers({"stdout": None}, tmp_path, CONFIG)
    loggers.log(3, {"loss": 0.5, "ranks": {"tokens": [7, 4, 9], "slowest": 2}})
    said = "step 3  loss 0.5  ranks/tokens/min 4  ranks/tokens/max 9  ranks/slowest 2"
    assert capsys.readouterr().out.splitlines() == [said]


def test_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", {"wandb": {"mode": "offline", "settings": {"console": "off"}}})
    assert list((tmp_path / "run").rglob("*.wandb"))


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where it puts artifacts
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    pytest.importorskip("sqlalchemy")
    write(tmp_path / "run", {"mlflow": {"tracking_uri": uri}})
    (run,) = mlflow.search_runs(experiment_names=["graphtune"], output_format="list")
    history = mlflow.MlflowClient(uri).get_metric_history(run.info.run_id, "loss")
    assert {m.step: m.value for m in history} == {1: 2.5, 2: 1.25}
    assert run.info.run_name == "run"


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read on import
    pytest.importorskip("trackio")
    write(tmp_path / "run", {"trackio": {}})
    rows = []
    for file in tmp_path.rglob("*.db"):
        with sqlite3.connect(file) as base:
            rows += base.execute("select step, metrics from metrics").fetchall()
    assert {step: json.loads(m)["loss"] for step, m in rows} == {1: 2.5, 2: 1.25}


def test_comet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path))
    write(tmp_path / "run", {"comet": {"online": False}})
    assert list(tmp_path.glob("*.zip"))


@pytest.mark.parametrize("name", sorted(set(LOGGERS) - {"stdout"}))
def test_a_missing_package_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tensorboard", "wandb", "mlflow", "comet_ml", "trackio"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=r"pip install \w+"):
        Loggers({name: {}}, tmp_path, CONFIG)


def test_options_that_are_refused_are_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(UserError, match="`loggers.tensorboard` cannot start: .*log_dirr"):
        Loggers({"tensorboard": {"log_dirr": "x"}}, tmp_path, CONFIG)
