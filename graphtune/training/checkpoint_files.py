"""Checkpoints on disk: written whole or not at all, verified before they are used.

A run's `checkpoints/` holds one folder for each, `step-00000120/`, with

- `state.safetensors`: every tensor of the state, under its path (`parameters/lm_head.weight`,
  `optimizers/0/state/lm_head.weight/exp_avg`, `rng/torch`),
- `state.json`: everything else; the size and the SHA-256 of every other file, its own SHA-256;
- what the recipe exports beside them for other programs, such as `adapter/` in PEFT's layout.

While it is written a checkpoint is called `.step-00000120.tmp`. Its files and folders are on the
disk (fsync) before it gets its name, by a rename, so that a process that is killed, or a machine
that loses power, leaves the checkpoint or none. Older ones are removed after that.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphtune.errors import UserError

TENSORS = "state.safetensors"
DESCRIPTION = "state.json"
PREFIX = "step-"
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment, apart from what goes on training.

    Attributes:
        step: optimizer steps taken.
        tensors: by path; contiguous, on the CPU, shared with nothing.
        description: everything else, as JSON.
        trained_bytes: how large the trained parameters are, all together.
    """

    step: int
    tensors: Mapping[str, Tensor]
    description: Mapping[str, Any]
    trained_bytes: int


def write_files(folder: Path, snapshot: Snapshot, metric: float | None) -> None:
    """Write a checkpoint's files into a folder, beside what was exported there; all on the disk.

    Raises:
        OSError, SafetensorError: they cannot be written.
    """
    save_file(dict(snapshot.tensors), folder / TENSORS, metadata={"format": "pt"})
    _write_description(folder, {**snapshot.description, "step": snapshot.step, "metric": metric})
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


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


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every hash is as it was written."""
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
            if _sha256(file) != says["sha256"]:
                return f"{name} has other content than was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's description and tensors, the latter on the CPU; hashes are not checked.

    Raises:
        UserError: it is none, or cannot be read.
    """
    description = read_state(path)
    try:
        return description, load_file(path / TENSORS)
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


# state.json is {"sha256": of the rest, **rest}.


def _write_description(folder: Path, description: Mapping[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    body = {
        **description,
        "files": {
            path.relative_to(folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
            for path in files
        },
    }
    text = _dump({"sha256": _digest(body), **body})
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


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
