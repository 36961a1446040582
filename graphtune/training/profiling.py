"""Record some steps of a run with torch's profiler."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from graphtune.torch_private import start_memory_history, write_memory_history

SNAPSHOT = "memory.pickle"  # beside the trace; torch's own format, which nothing here reads


class StepProfiler:
    """Records `steps` steps from step `start` on, and writes them as a Chrome trace.

    Args:
        path: the trace, which chrome://tracing and https://ui.perfetto.dev open.
        start: first step recorded, counted from 1.
        steps: how many.
        memory: record allocations too: in the trace, and where the device's allocator keeps a
            history (CUDA's does) in `memory.pickle`, which https://docs.pytorch.org/memory_viz
            shows, with the line of code of each.
        device: that the steps run on.
    """

    def __init__(
        self, path: Path, *, start: int, steps: int, device: torch.device, memory: bool = False
    ) -> None:
        self.path = path
        self.start = start
        self.end = start + steps
        self.device = device
        self.memory = memory
        self._keeps_history = False
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """To be called when step `step` is about to be taken."""
        if step == self.start:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            if self.memory:
                self._keeps_history = start_memory_history(self.device)
            self._profile = profile(activities=activities, profile_memory=self.memory)
            self._profile.__enter__()
        elif step == self.end:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if anything was."""
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self._profile.export_chrome_trace(str(self.path))
            self._profile = None
        if self._keeps_history:
            write_memory_history(self.device, self.path.with_name(SNAPSHOT))
            self._keeps_history = False
