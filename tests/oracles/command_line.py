"""Runs of the real command line, in this process or one of their own, and what they leave."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from graphtune.cli import main
from graphtune.training.checkpoint_files import latest, read_checkpoint
from tests.oracles.models import assert_same_tensors

_CLOCKED = ("tokens_per_s", "tflops", "peak_memory_bytes", "seconds", "ranks")


def graphtune(*words: object) -> int | str | None:
    """Run the command line in this process; its exit code."""
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return end.code or 0
    return 0


def start(*words: object, log: Path) -> subprocess.Popen[bytes]:
    """Start the command line in a process of its own, which writes all it says to `log`."""
    command = [str(Path(sys.executable).parent / "graphtune"), *map(str, words)]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The run's lines of metrics, without what a clock has measured."""
    return [
        {key: value for key, value in line.items() if not key.endswith(_CLOCKED)}
        for line in lines(run / "metrics.jsonl")
    ]


def changed(config: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with keys set; mappings are merged, and None removes a key."""
    made = copy.deepcopy(dict(config))
    for change in changes:
        for key, value in change.items():
            if value is None:
                made.pop(key, None)
            elif isinstance(value, Mapping) and isinstance(made.get(key), Mapping):
                made[key] = changed(made[key], value)
            else:
                made[key] = copy.deepcopy(value)
    return made


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(config)))
    return path


def trained(run: Path) -> dict[str, Tensor]:
    """What the run saved as its result."""
    (file,) = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")] or [
        run / "trained.safetensors"
    ]
    return load_file(file)


def assert_same_run(found: Path, expected: Path) -> None:
    """The same bits: results, lines of metrics, and the whole state after the last step."""
    assert metrics(found) == metrics(expected)
    assert_same_tensors(trained(found), trained(expected))
    ours, theirs = (read_checkpoint(latest(run / "checkpoints")) for run in (found, expected))
    assert ours[0]["step"] == theirs[0]["step"]
    for name, value in theirs[0]["state"].items():
        if name != "counters":
            assert ours[0]["state"][name] == value, name
    assert_same_tensors(ours[1], theirs[1])
