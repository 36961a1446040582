"""The line that shows how training goes."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """A live line in a terminal; elsewhere one plain line for each update.

    Use as a context manager.
    """

    def __init__(self, steps: int, console: Console) -> None:
        self.steps = steps
        self.console = console
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TextColumn("elapsed"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("train", total=steps, figures="compiling")

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self, step: int, *, loss: float, tokens_per_s: float, memory: int, eta_s: float
    ) -> None:
        """Show step `step` (from 1); memory in bytes."""
        figures = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s  {memory / 2**30:.1f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        else:
            minutes, seconds = divmod(round(eta_s), 60)
            self.console.print(
                f"step {step}/{self.steps}  {figures}  ETA {minutes}:{seconds:02d}", highlight=False
            )
