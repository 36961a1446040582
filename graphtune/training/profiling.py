"""Record some steps of a run with torch's profiler."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfiler:
    """Records `steps` steps from step `start` on, and writes them as a Chrome trace.

    Args:
        path: the trace, which chrome://tracing and https://ui.perfetto.dev open.
        start: first step recorded, counted from 1.
        steps: how many.
        memory: record allocations too.
    """

    def __init__(self, path: Path, *, start: int, steps: int, memory: bool = False) -> None:
        self.path = path
        self.start = start
        self.end = start + steps
        self.memory = memory
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """To be called when step `step` is about to be taken."""
        if step == self.start:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
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
