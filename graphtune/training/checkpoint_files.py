"""Checkpoints on disk: written whole or not at all, verified before they are used.

A run's `checkpoints/` holds one folder for each, `step-00000120/`, with

- `state.safetensors`: every tensor of the state, under its path (`parameters/lm_head.weight`,
  `optimizers/0/state/lm_head.weight/exp_avg`, `rng/torch`); of several ranks, each that writes has
  its own, `state-rank-3.safetensors`, see `graphtune.training.stored`,
- `state.json`: everything else; the size and the SHA-256 of every other file, its own SHA-256;
- what the recipe exports beside them for other programs, such as `adapter/` in PEFT's layout.

While it is written a checkpoint is called `.step-00000120.tmp`. Its files and folders are on the
disk (fsync) before it gets its name, by a rename, so that a process that is killed, or a machine
that loses power, leaves the checkpoint or none. Older ones are removed after that.

Ranks write at once, and nothing is exchanged, as training goes on meanwhile: each ends by leaving a
record beside its file, with its hash or with what went wrong, for which rank 0 waits.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from graphtune.errors import UserError
from graphtune.training.stored import TENSORS, StoredTensors, Wanted

DESCRIPTION = "state.json"
PREFIX = "step-"
RECORD = ".record"  # after the name of the file that it is of
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)


@dataclass(frozen=True)
class Snapshot:
    """What a rank writes of a run at one moment, apart from what goes on training.

    Attributes:
        step: optimizer steps taken.
        tensors: by path; contiguous, on the CPU, shared with nothing.
        description: everything else, as JSON.
        trained_bytes: how large the trained parameters are, all together and whole.
        file: where the tensors go.
        others: files that other ranks write.
    """

    step: int
    tensors: Mapping[str, Tensor]
    description: Mapping[str, Any]
    trained_bytes: int
    file: str = TENSORS
    others: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """How large its tensors are."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write_files(folder: Path, snapshot: Snapshot, metric: float | None, timeout_s: float) -> None:
    """Write a checkpoint's files into a folder, beside what was exported there; all on the disk.

    Of several ranks it is rank 0 that calls.

    Args:
        timeout_s: how long to wait for what other ranks write.

    Raises:
        OSError, SafetensorError: they cannot be written, or another rank's could not.
    """
    _write_tensors(folder, snapshot)
    written = _of_others(folder, snapshot.others, timeout_s)
    description = {**snapshot.description, "step": snapshot.step, "metric": metric}
    _write_description(folder, description, written)
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_share(folder: Path, snapshot: Snapshot) -> None:
    """Write what another rank than 0 has of a checkpoint, on the disk; then its record.

    Raises:
        OSError, SafetensorError: it cannot be written; the record says so.
    """
    if not snapshot.tensors:
        return
    try:
        _write_tensors(folder, snapshot)
        sync(folder / snapshot.file)
        _write_record(folder, snapshot.file, _facts(folder / snapshot.file))
    except BaseException as error:
        with suppress(OSError):
            _write_record(folder, snapshot.file, {"error": f"{type(error).__name__}: {error}"})
        raise


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, readable or not, newest first."""
    found = [
        path for path in Path(folder).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()
    ]
    return sorted(found, key=step_of, reverse=True)


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint that is undamaged; None where there are no checkpoints.

    Warns of each newer one that is damaged, naming the file.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found = checkpoints(folder)
    for path in found:
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"{path} cannot be used: {problem}; trying the one before", stacklevel=2)
    if found:
        raise UserError(f"{folder}: every checkpoint is damaged; start again in a new output_dir")
    return None


def to_resume(resume: str | None, folder: str | Path) -> Path | None:
    """The checkpoint that a run goes on with, or None to start at step 0.

    Args:
        resume: `auto` for the newest in `folder`, if there is one; None to start; else a
            checkpoint, or a folder of them.
        folder: of this run's own checkpoints.

    Raises:
        UserError: what is named holds no checkpoint, or only damaged ones.
    """
    if resume is None:
        return None
    if resume == "auto":
        return latest(folder)
    path = Path(resume)
    if (path / DESCRIPTION).is_file():
        problem = damage(path)
        if problem is not None:
            raise UserError(f"`resume={resume}` is damaged: {problem}; choose another checkpoint")
        return path
    found = latest(path) or latest(path / "checkpoints")
    if found is None:
        raise UserError(f"`resume={resume}` holds no checkpoint; give a step-* folder, or `auto`")
    return found


def damage(path: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every hash is as it was written.

    Args:
        hashes: False looks at the files' sizes alone, which takes no time.
    """
    try:
        description = _read_description(path)
    except UNREADABLE as error:
        return f"{DESCRIPTION} is damaged ({error})"
    for name, says in description["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != says["bytes"]:
                return f"{name} has {size:,} bytes, not {says['bytes']:,}"
            if hashes and _sha256(file) != says["sha256"]:
                return f"{name} has other content than was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def read_checkpoint(
    path: Path, wanted: Wanted = lambda path, shape: ()
) -> tuple[dict[str, Any], StoredTensors]:
    """A checkpoint's description and tensors, which are read one by one; hashes are not checked.

    Args:
        path: the checkpoint.
        wanted: what of each tensor is read, see `StoredTensors`; by default the whole.

    Raises:
        UserError: it is none, or cannot be read.
    """
    description = read_state(path)
    try:
        return description, StoredTensors(path, description, wanted)
    except UNREADABLE as error:
        raise UserError(f"{path} is no checkpoint that can be read: {error}") from error


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's description alone, without its tensors; raises UserError likewise."""
    try:
        return _read_description(path)
    except UNREADABLE as error:
        raise UserError(f"{path} is no checkpoint that can be read: {error}") from error


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.removeprefix(PREFIX))


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk, not on their way there."""
    if path.is_dir() and os.name == "nt":  # Windows cannot, and need not, sync a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensors(folder: Path, snapshot: Snapshot) -> None:
    save_file(dict(snapshot.tensors), folder / snapshot.file, metadata={"format": "pt"})


def _write_record(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    unfinished = folder / f"{name}{RECORD}.tmp"
    unfinished.write_text(_dump(record), encoding="utf-8")
    unfinished.replace(folder / f"{name}{RECORD}")


def _of_others(folder: Path, names: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """Size and hash of the files that other ranks write, once all are there; takes their records.

    Raises:
        OSError: one could not be written, or took too long.
    """
    found: dict[str, Any] = {}
    end = time.monotonic() + timeout_s
    while missing := [name for name in names if name not in found]:
        there = {path.name for path in folder.glob(f"*{RECORD}")}
        for name in missing:
            record = folder / f"{name}{RECORD}"
            if record.name in there:
                found[name] = json.loads(record.read_text(encoding="utf-8"))
                record.unlink()
                if "error" in found[name]:
                    raise OSError(f"{name}: {found[name]['error']}")
        if len(found) < len(names):
            if time.monotonic() > end:
                raise TimeoutError(f"{', '.join(missing)} not there after {timeout_s:g} seconds")
            time.sleep(0.05)
    return found


# state.json is {"sha256": of the rest, **rest}.


def _write_description(
    folder: Path, description: Mapping[str, Any], written: Mapping[str, Any]
) -> None:
    """`written`: size and hash of files, by name, that others have counted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    body = {
        **description,
        "files": {name: written.get(name) or _facts(path) for name, path in names.items()},
    }
    text = _dump({"sha256": _digest(body), **body})
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _read_description(folder: Path) -> dict[str, Any]:
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    if description.pop("sha256") != _digest(description):
        raise ValueError("it has other content than was written")
    return description


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(body).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def metric_of(path: Path) -> float | None:
    """The metric that a checkpoint was saved with; None if it has none that can be ranked."""
    try:
        metric = _read_description(path)["metric"]
    except UNREADABLE:
        return None
    return None if metric is None or math.isnan(metric) else float(metric)
