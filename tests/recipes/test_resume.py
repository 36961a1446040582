"""A run that was stopped and gone on with is, bit for bit, the run that was not."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from graphtune.engine import TrainStep
from graphtune.training.checkpoint_files import checkpoints
from tests.oracles.command_line import (
    assert_same_run,
    changed,
    graphtune,
    lines,
    metrics,
    start,
    trained,
    write_config,
)

LORA = {"passes": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}}
FULL = {"passes": {"lora": None, "full": {}}, "optimizer": {"lr": 1e-3}}
QLORA = {"passes": {"quantize": {"format": "nf4"}, "lora": {"rank": 4, "dropout": 0.1}}}
BUSY = {
    "gradient_accumulation_steps": 2,
    "epochs": 3,
    "max_steps": None,
    "checkpoint": {"every_steps": 1},
}


class Stopped(BaseException):
    """As a power cut: nothing is caught or saved any more."""


def cut_at(monkeypatch, step):
    """End the process's work in the middle of an optimizer step, counted within it from 1."""
    taken = []
    real = TrainStep.__call__

    def call(self, batch, **options):
        taken.append(1)
        if len(taken) == step:
            raise Stopped
        return real(self, batch, **options)

    monkeypatch.setattr(TrainStep, "__call__", call)


def stopped_at(monkeypatch, path, step, *overrides):
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        cut_at(patched, step)
        graphtune("train", path, *overrides)


CASES = {
    "lora, packed": (LORA, {"ema_decay": 0.9}),
    "full, bucketed": (FULL, {"loader": {"mode": "bucketed", "batch_size": 3, "shapes": 2}}),
    "qlora, padded, workers": (QLORA, {"loader": {"mode": "padded", "workers": 2}}),
    "lora, padding-free, neftune": (
        {"passes": {"lora": {"rank": 4, "dropout": 0.1}, "neftune": {"alpha": 5}}},
        {"loader": {"mode": "padding_free"}},
    ),
    "lora, stream": (
        LORA,
        {
            "dataset": {"streaming": True},
            "max_steps": 9,
            "loader": {"window": 7, "mode": "bucketed", "shapes": 2},
        },
    ),
}


QUICK = ("lora, packed", "lora, stream")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_cut_twice_it_ends_with_the_same_bits(quick, tmp_path, monkeypatch, name):
    config = changed(quick, BUSY, *CASES[name])
    path = write_config(tmp_path / "config.yaml", config)
    whole = tmp_path / "whole"
    assert graphtune("train", path, f"output_dir={whole}") == 0
    steps = len(metrics(whole))
    assert steps >= 8
    stopped_at(monkeypatch, path, 3)  # two steps were taken
    stopped_at(monkeypatch, path, steps - 4, "resume=auto", "loader.workers=0")
    assert graphtune("train", path, "resume=auto") == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, steps + 1))
    assert_same_run(tmp_path / "run", whole)


def test_cut_before_the_first_checkpoint_it_starts_again(quick, tmp_path, monkeypatch):
    path = write_config(tmp_path / "config.yaml", changed(quick, {"max_steps": 4}))
    stopped_at(monkeypatch, path, 3)
    run = tmp_path / "run"
    assert len(metrics(run)) == 2 and not checkpoints(run / "checkpoints")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a line that was being written
    assert graphtune("train", path, "resume=auto") == 0
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(quick, tmp_path, monkeypatch):
    config = changed(quick, LORA, {"checkpoint": {"every_steps": 2}, "max_steps": 6})
    path = write_config(tmp_path / "config.yaml", config)
    assert graphtune("train", path, f"output_dir={tmp_path / 'whole'}") == 0
    stopped_at(monkeypatch, path, 6)
    newest = checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert newest.name == "step-00000004"
    with (newest / "state.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\xff")
    with pytest.warns(UserWarning, match=r"step-00000004 cannot be used: state.safetensors"):
        assert graphtune("train", path, "resume=auto") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_has_ended_is_not_trained_again_unless_it_shall(quick, tmp_path, capsys):
    path = write_config(tmp_path / "config.yaml", changed(quick, {"max_steps": 3}))
    run = tmp_path / "run"
    assert graphtune("train", path, "resume=auto") == 0, "there is nothing yet: it starts"
    before, results = metrics(run), trained(run)
    capsys.readouterr()
    assert graphtune("train", path, "resume=auto") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "has ended" in said and "max_steps" in said and "capturing" not in said
    assert metrics(run) == before

    assert graphtune("train", path, "resume=auto", "max_steps=5", "optimizer.lr=1") == 2
    assert "`optimizer.lr` was 0.01, is 1" in capsys.readouterr().err
    assert "lr: 0.01" in (run / "config.yaml").read_text(), "the run's config is still its own"

    assert graphtune("train", path, "resume=auto", "max_steps=5") == 0
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]
    assert metrics(run)[:3] == before
    assert metrics(run)[3]["lr"] > 0, "the schedule is that of five steps now"
    assert json.loads((run / "summary.json").read_text())["train"]["steps"] == 5
    assert any(not torch.equal(results[name], tensor) for name, tensor in trained(run).items())
    assert graphtune("train", path, "resume=auto", "max_steps=2") == 0, "less than there is"
    assert len(metrics(run)) == 5


def test_another_config_is_refused_before_anything_takes_long(quick, tmp_path, capsys, monkeypatch):
    config = changed(quick, {"max_steps": 3, "checkpoint": {"every_steps": 1}})
    path = write_config(tmp_path / "config.yaml", config)
    stopped_at(monkeypatch, path, 2)

    def too_late(model):
        raise AssertionError("capture started")

    monkeypatch.setattr("graphtune.recipes.sft.capture", too_late)
    for override, said in (
        ("passes.lora.rank=2", "`passes.lora.rank` was 4, is 2"),
        ("loader.batch_size=4", "`loader.batch_size` was 2, is 4"),
        ("~optimizer", "`optimizer.lr` was 0.01, is 0.0003"),
    ):
        assert graphtune("train", path, "resume=auto", override) == 2
        assert said in capsys.readouterr().err
    assert graphtune("train", path) == 2
    assert "resume=auto" in capsys.readouterr().err


def test_a_new_run_goes_on_from_anothers_checkpoint(quick, tmp_path, capsys):
    path = write_config(tmp_path / "config.yaml", changed(quick, {"max_steps": 4}))
    first, second = tmp_path / "run", tmp_path / "second"
    assert graphtune("train", path, "checkpoint.every_steps=2", "checkpoint.keep_last=null") == 0
    words = ["train", path, f"resume={first / 'checkpoints' / 'step-00000002'}"]
    assert graphtune(*words, f"output_dir={second}") == 0
    assert metrics(second) == metrics(first)[2:]
    assert all(torch.equal(trained(first)[n], tensor) for n, tensor in trained(second).items())
    assert graphtune(*words, f"output_dir={second}") == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_chosen_batch_size_stays_what_it_was(quick, tmp_path, monkeypatch):
    config = changed(quick, {"loader": {"batch_size": "auto"}, "checkpoint": {"every_steps": 1}})
    config = changed(config, {"epochs": 3, "max_steps": None})
    path = write_config(tmp_path / "config.yaml", config)
    monkeypatch.setattr("graphtune.recipes.job.largest_batch", lambda *_, **__: 3)
    assert graphtune("train", path, f"output_dir={tmp_path / 'whole'}") == 0
    stopped_at(monkeypatch, path, 2)
    monkeypatch.setattr("graphtune.recipes.job.largest_batch", lambda *_, **__: 5)
    assert graphtune("train", path, "resume=auto") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_samples_and_held_out_losses_come_once(quick, tmp_path, monkeypatch):
    config = changed(
        quick,
        {
            "dataset_val": quick["dataset"],
            "samples": {"prompts": ["What is 1?"], "every_steps": 1, "max_new_tokens": 2},
            "validate_every": 2,
            "early_stopping": {"patience": 9},
            "checkpoint": {"every_steps": 2},
        },
    )
    path = write_config(tmp_path / "config.yaml", config)
    assert graphtune("train", path, f"output_dir={tmp_path / 'whole'}") == 0
    stopped_at(monkeypatch, path, 6)
    assert graphtune("train", path, "resume=auto") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    samples = [lines(tmp_path / name / "samples.jsonl") for name in ("run", "whole")]
    assert samples[0] == samples[1] and len(samples[0]) == 8
    assert sum("heldout_loss" in line for line in metrics(tmp_path / "run")) == 4
    before = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("run", "whole")]
    assert before[0]["before"] == before[1]["before"] and before[0]["after"] == before[1]["after"]


def test_one_signal_saves_and_two_leave_at_once(quick, tmp_path, monkeypatch):
    path = write_config(tmp_path / "config.yaml", changed(quick, LORA))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert graphtune("train", path, f"output_dir={whole}") == 0
    real = TrainStep.__call__

    def interrupted_at(step, *numbers):
        taken = []

        def call(self, batch, **options):
            taken.append(1)
            if len(taken) == step:
                for number in numbers:
                    signal.raise_signal(number)
            return real(self, batch, **options)

        monkeypatch.setattr(TrainStep, "__call__", call)

    interrupted_at(3, signal.SIGINT)
    assert graphtune("train", path) == 130
    assert [one.name for one in checkpoints(run / "checkpoints")] == ["step-00000003"]
    assert len(metrics(run)) == 3 and trained(run)
    interrupted_at(2, signal.SIGTERM)
    assert graphtune("train", path, "resume=auto") == 130
    assert len(metrics(run)) == 5
    shutil.rmtree(run / "adapter")
    interrupted_at(2, signal.SIGINT, signal.SIGINT)
    assert graphtune("train", path, "resume=auto") == 130
    assert len(metrics(run)) == 6 and not (run / "adapter").exists()
    monkeypatch.setattr(TrainStep, "__call__", real)
    assert graphtune("train", path, "resume=auto") == 0
    assert_same_run(run, whole)


def test_loaders_key_is_of_the_data(quick, tmp_path, monkeypatch, capsys):
    """The same config over another file's rows is another run."""
    path = write_config(
        tmp_path / "config.yaml", changed(quick, {"checkpoint": {"every_steps": 1}})
    )
    stopped_at(monkeypatch, path, 3)
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text() + json.dumps({"prompt": "Why?", "response": "So."}) + "\n")
    assert graphtune("train", path, "resume=auto") == 2
    assert "other data or options" in capsys.readouterr().err


def kill_until_done(path, run, *, kills, chance, log):
    """Kill the command at random moments; then let it end. How often it was killed."""
    killed = 0
    while killed < kills:
        process = start("train", path, "resume=auto", log=log)
        seen = run / "metrics.jsonl"
        began = seen.stat().st_mtime_ns if seen.exists() else 0
        while process.poll() is None:
            # Mostly once steps are being taken; sometimes before.
            is_training = seen.exists() and seen.stat().st_mtime_ns != began
            if is_training or chance.random() < 0.002:
                time.sleep(chance.random() * 0.3)
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed += 1
        else:
            assert process.returncode == 0, log.read_text()
            break
    process = start("train", path, "resume=auto", log=log)
    assert process.wait() == 0, log.read_text()
    return killed


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_it_ends_with_the_same_bits(quick, tmp_path, kills):
    config = changed(
        quick,
        LORA,
        {"ema_decay": 0.9, "epochs": 40, "max_steps": 8 * kills},
        {"checkpoint": {"every_steps": 1}, "gradient_accumulation_steps": 2},
    )
    path = write_config(tmp_path / "config.yaml", config)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert graphtune("train", path, f"output_dir={whole}") == 0
    log = tmp_path / "log"
    killed = kill_until_done(path, run, kills=kills, chance=random.Random(kills), log=log)
    assert killed >= (kills + 1) // 2
    assert [line["step"] for line in metrics(run)] == list(range(1, 8 * kills + 1))
    assert_same_run(run, whole)
