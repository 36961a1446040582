"""Recording steps: the history of a device's allocator, beside the trace of torch's profiler."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graphtune.training.profiling import SNAPSHOT, StepProfiler

CPU = torch.device("cpu")


def take_steps(profiler: StepProfiler, steps: int) -> None:
    for step in range(1, steps + 1):
        profiler.before(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.close()
    profiler.close()  # twice does no harm


def test_an_allocator_with_a_history_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the module of a device that is not here, which tells what was asked of it."""
    trace, asked = tmp_path / "profile.json", []

    def record(**options: Any) -> None:
        asked.append(("record", options, trace.exists()))

    def dump(path: str) -> None:
        asked.append(("dump", path, trace.exists()))

    memory = SimpleNamespace(_record_memory_history=record, _dump_snapshot=dump)
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(memory=memory))
    take_steps(StepProfiler(trace, start=2, steps=2, memory=True, device=CPU), 5)
    assert asked == [
        ("record", {}, False),
        ("dump", str(tmp_path / "memory.pickle"), True),
        ("record", {"enabled": None}, True),
    ]
    asked.clear()
    take_steps(StepProfiler(trace, start=2, steps=2, device=CPU), 5)
    take_steps(StepProfiler(trace, start=9, steps=2, memory=True, device=CPU), 5)
    assert asked == []


def test_on_a_cpu_allocations_are_in_the_trace(tmp_path: Path) -> None:
    trace = tmp_path / "profile.json"
    take_steps(StepProfiler(trace, start=1, steps=1, memory=True, device=CPU), 2)
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::mm", "[memory]"} <= names
    assert not (tmp_path / SNAPSHOT).exists()
