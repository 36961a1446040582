"""Whatever happens while a checkpoint is written, the run can go on from one.

Run as a program, this file trains, is killed, and goes on; see `test_killed_at_any_moment`.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import graphtune as gt
from graphtune.training import checkpoint_files
from graphtune.training.checkpoint import Checkpointer
from graphtune.training.checkpoint_files import checkpoints, damage, latest, to_resume
from tests.oracles.tiny_run import TinyRun, assert_same_run


def steps_in(folder):
    return [int(path.name.removeprefix("step-")) for path in checkpoints(folder)]


def saved(folder, steps, **options):
    """A run with a checkpoint after each of these steps."""
    run = TinyRun()
    with Checkpointer(folder, **options) as checkpointer:
        for step in steps:
            checkpointer.save(run.until(step).state, export=export)
    return run


def export(folder):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"rank": 8}')


def test_a_checkpoint_is_a_folder_of_files_that_say_what_they_are(tmp_path):
    run = saved(tmp_path, [3])
    folder = tmp_path / "step-00000003"
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {"state.safetensors", "state.json", "adapter/adapter_config.json"}
    description = json.loads((folder / "state.json").read_text())
    assert description["step"] == 3
    assert description["files"].keys() == files - {"state.json"}
    tensors = load_file(folder / "state.safetensors")
    assert torch.equal(tensors["parameters/out.weight"], run.model.out.weight)
    assert list(tmp_path.iterdir()) == [folder]


# Killed, and gone on with


@pytest.mark.parametrize(
    ("kills", "steps"), [(4, 40), pytest.param(30, 200, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment_the_run_ends_with_the_same_bits(tmp_path, kills, steps):
    folder = tmp_path / "run"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, __file__, str(folder), str(kills), str(steps)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lives = json.loads(done.stdout.splitlines()[-1])
    assert len(lives) == kills
    assert len({life["newest"] for life in lives}) > kills / 3  # spread over the run
    assert kills < 30 or any(life["writing"] for life in lives)  # in the middle of a checkpoint
    assert latest(folder).name == f"step-{steps:08d}"
    assert_same_run(TinyRun().restored(latest(folder)), TinyRun().until(steps))
    assert not list(folder.glob(".*"))


def train_and_save(folder, steps):
    """Save every other step, as fast as can be, while training goes on; start or go on."""
    run = TinyRun()
    found = to_resume("auto", folder)
    if found is not None:
        run.restored(found)
    with Checkpointer(folder, keep_last=2) as checkpointer:
        while run.state.step < steps:
            run.step()
            if run.state.step % 2 == 0:
                checkpointer.save(run.state, export=export)


def drive(folder, kills, steps):
    """Train in child processes, of which all but the last are killed by SIGKILL.

    Each lives until it has written some checkpoints, and then for up to the time that one takes.
    Forked from here, where no thread runs, they need not import torch anew.
    """
    saved(folder, [0])  # the first takes longer
    start = time.monotonic()
    saved(folder, [1, 2, 3, 4])
    span = (time.monotonic() - start) / 4
    chance = random.Random(0)
    lives = []
    while True:
        child = os.fork()
        if child == 0:
            live(folder, steps)
        if len(lives) < kills:
            goal = min(newest(folder) + 2 * chance.randrange(3), steps - 4)
            while newest(folder) < goal and not ended(child):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, span))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status >= 0:
            print(json.dumps(lives))
            return status
        lives.append({"newest": newest(folder), "writing": any(folder.glob(".*"))})


def live(folder, steps):
    """What a child process does; does not return."""
    status = 1
    try:
        warnings.simplefilter("error")  # a kill must not leave damage, not even repaired
        train_and_save(folder, steps)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def newest(folder):
    return max(steps_in(folder), default=0)


# Damage


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    chance = random.Random(len(content))
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "adapter/adapter_config.json"])
def test_a_damaged_file_is_named_and_the_one_before_is_used(tmp_path, harm, name):
    saved(tmp_path, [2, 4])
    harm(tmp_path / "step-00000004" / name)
    with pytest.warns(UserWarning) as told:
        found = latest(tmp_path)
    assert found == tmp_path / "step-00000002"
    assert (
        len(told) == 1 and name in str(told[0].message) and "step-00000004" in str(told[0].message)
    )
    assert_same_run(TinyRun().restored(found).until(6), TinyRun().until(6))


def test_no_bit_of_a_description_can_change_unseen(tmp_path):
    saved(tmp_path, [1])
    file = tmp_path / "step-00000001" / "state.json"
    content = file.read_bytes()
    chance = random.Random(0)
    for _ in range(200):
        changed = bytearray(content)
        changed[chance.randrange(len(content) - 1)] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        assert damage(file.parent) is not None
    for length in {0, 1, 64, len(content) // 2, len(content) - 2}:
        file.write_bytes(content[:length])
        assert damage(file.parent) is not None


def test_going_on_behind_a_damaged_checkpoint_replaces_it(tmp_path):
    saved(tmp_path, [2, 4, 6])
    assert steps_in(tmp_path) == [6, 4]
    truncate(tmp_path / "step-00000006" / "state.safetensors")
    with pytest.warns(UserWarning):
        run = TinyRun().restored(latest(tmp_path))
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(run.until(5).state)
    assert steps_in(tmp_path) == [5]  # and not the damaged one, whose step is later
    saved(tmp_path, [6])
    truncate(tmp_path / "step-00000006" / "state.json")
    saved(tmp_path, [6])
    assert latest(tmp_path) == tmp_path / "step-00000006"


def test_what_cannot_be_gone_on_with_is_told(tmp_path):
    assert to_resume(None, tmp_path) is None
    assert to_resume("auto", tmp_path / "missing") is None
    with pytest.raises(gt.UserError, match="holds no checkpoint"):
        to_resume(str(tmp_path), tmp_path)
    run = tmp_path / "run"
    saved(run / "checkpoints", [1, 2])
    assert to_resume(str(run), tmp_path) == run / "checkpoints" / "step-00000002"
    assert to_resume("auto", run / "checkpoints") == run / "checkpoints" / "step-00000002"
    for path in checkpoints(run / "checkpoints"):
        truncate(path / "state.safetensors")
    with pytest.raises(gt.UserError, match="state.safetensors has"):
        to_resume(str(path), tmp_path)
    with (
        pytest.warns(UserWarning),
        pytest.raises(gt.UserError, match="every checkpoint is damaged"),
    ):
        to_resume("auto", run / "checkpoints")


# Full disks


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    run = saved(tmp_path, [1])
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with (
        pytest.raises(gt.UserError, match="1 MiB of the disk are free"),
        Checkpointer(tmp_path, keep_last=1) as checkpointer,
    ):
        checkpointer.save(run.until(2).state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert damage(tmp_path / "step-00000001") is None


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: os error 28")],
)
@pytest.mark.parametrize("function", ["save_file", "_write_description", "sync"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fills_up_leaves_the_earlier_ones(
    tmp_path, monkeypatch, error, function, asynchronous
):
    run = saved(tmp_path, [1])

    def full(*arguments, **options):
        raise error

    with Checkpointer(tmp_path, keep_last=1, asynchronous=asynchronous) as checkpointer:
        with monkeypatch.context() as patch, pytest.raises(gt.UserError, match="step-00000002"):
            patch.setattr(checkpoint_files, function, full)
            checkpointer.save(run.until(2).state)
            checkpointer.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        assert damage(tmp_path / "step-00000001") is None
        checkpointer.save(run.until(3).state)  # there is room again
    assert steps_in(tmp_path) == [3]


def test_an_export_that_fails_leaves_nothing_behind(tmp_path):
    def failing(folder):
        (folder / "half").write_text("x")
        raise ZeroDivisionError

    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ZeroDivisionError):
        checkpointer.save(TinyRun().state, export=failing)
    assert not list(tmp_path.iterdir())


# Writing while training goes on


def test_what_is_saved_is_the_state_at_that_moment(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = checkpoint_files.save_file

    def late(*arguments, **options):
        assert may_write.wait(10)
        write(*arguments, **options)

    monkeypatch.setattr(checkpoint_files, "save_file", late)
    run = TinyRun().until(3)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(run.state, metric=1.0)
        assert not checkpoints(tmp_path)
        run.until(6)
        run.state.counters["losses"].clear()
        may_write.set()
    assert_same_run(TinyRun().restored(latest(tmp_path)), TinyRun().until(3))


def test_an_error_of_the_thread_is_raised_at_the_next_call(tmp_path, monkeypatch):
    def wrong(*arguments, **options):
        raise RuntimeError("a bug")

    run = TinyRun().until(1)
    with Checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_files, "save_file", wrong)
            checkpointer.save(run.state)
            time.sleep(0.1)
        with pytest.raises(RuntimeError, match="a bug"):
            checkpointer.save(run.until(2).state)
        checkpointer.save(run.state)
    assert steps_in(tmp_path) == [2]


# Which are written, and which are kept


def test_due_by_steps_or_minutes(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, every_steps=3, every_minutes=10)
    assert [step for step in range(1, 8) if checkpointer.due(step)] == [3, 6]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 601)
    assert checkpointer.due(4)
    checkpointer.save(TinyRun().state)
    assert not checkpointer.due(4)
    checkpointer.wait()
    assert not Checkpointer(tmp_path).due(100)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 1}, [6]),
        ({"keep_last": 3}, [6, 5, 4]),
        ({"keep_last": None}, [6, 5, 4, 3, 2, 1]),
        ({"keep_last": 1, "keep_best": 1}, [6, 3]),
        ({"keep_last": 1, "keep_best": 2}, [6, 4, 3]),
    ],
)
def test_last_and_best_are_kept(tmp_path, options, kept):
    metrics = {1: 5.0, 2: None, 3: 1.0, 4: 2.0, 5: float("nan"), 6: 3.0}
    run = TinyRun()
    with Checkpointer(tmp_path, **options) as checkpointer:
        for step, metric in metrics.items():
            checkpointer.save(run.until(step).state, metric=metric)
    assert steps_in(tmp_path) == kept
    assert checkpointer.best() == min(
        checkpoints(tmp_path), key=lambda path: metrics[int(path.name[-1])] or 9
    )


def test_old_ones_go_only_when_the_new_one_is_on_disk(tmp_path, monkeypatch):
    done = []
    sync = checkpoint_files.sync
    run = saved(tmp_path, [1])
    for module in ("checkpoint", "checkpoint_files"):
        monkeypatch.setattr(
            f"graphtune.training.{module}.sync",
            lambda path: done.append((path.name, steps_in(tmp_path))) or sync(path),
        )
    with Checkpointer(tmp_path, keep_last=1, asynchronous=False) as checkpointer:
        checkpointer.save(run.until(2).state, export=export)
    temporary = {"state.safetensors", "state.json", "adapter", "adapter_config.json"}
    assert {name for name, _ in done[:-1]} == temporary | {".step-00000002.tmp"}
    assert done[-1] == (tmp_path.name, [2, 1])
    assert steps_in(tmp_path) == [2]


def test_what_killed_processes_left_is_removed_at_the_next_start(tmp_path):
    saved(tmp_path, [1])
    for name in (".step-00000002.tmp", ".step-00000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-by-step").mkdir()
    assert latest(tmp_path) == tmp_path / "step-00000001"
    Checkpointer(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001", "notes.txt", "step-by-step"}


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(gt.UserError, match="checkpoint.keep_last=0"):
        Checkpointer(tmp_path, keep_last=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(drive(Path(sys.argv[1]), *map(int, sys.argv[2:])))
