"""When a run's checkpoints are written, and which of them are kept.

What a checkpoint is made of: `graphtune.training.checkpoint_files`.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

from safetensors import SafetensorError

from graphtune.distributed import is_main, is_spread
from graphtune.errors import UserError
from graphtune.training.checkpoint_files import (
    DESCRIPTION,
    PREFIX,
    Snapshot,
    checkpoints,
    damage,
    metric_of,
    step_of,
    sync,
    to_resume,
    write_files,
    write_share,
)
from graphtune.training.ranks import from_main, gathered_counts, on_main, same, together

_MARGIN = 16 * 2**20  # bytes of disk beyond the tensors: JSON, and what others write meanwhile
_SEEN_S = 60  # seconds that a shared disk may take to show other machines a new folder


def resumed(resume: str | None, folder: str | Path) -> Path | None:
    """`to_resume` of several ranks: rank 0 alone reads all files, to hash them.

    All ranks must call. The others look whether they see the same checkpoint, and all its files.

    Raises:
        UserError: on every rank, if what is named holds no checkpoint, or only damaged ones, or a
            rank does not see it.
    """
    path = on_main(lambda: to_resume(resume, folder))
    if path is not None and is_spread():
        together(lambda: _check_sight(path))
        same(
            hashlib.sha256((path / DESCRIPTION).read_bytes()).hexdigest(),
            f"ranks see other checkpoints at {path}: it must be on a disk that all machines share",
        )
    return path


def _check_sight(path: Path) -> None:
    _see(path)
    if problem := damage(path, hashes=False):
        raise UserError(
            f"{path}: {problem} as this rank sees it; it must be on a disk that all machines share"
        )


class HasSnapshot(Protocol):
    """Such as a `TrainState`."""

    step: int

    def snapshot(self) -> Snapshot: ...


class Checkpointer:
    """Writes a run's checkpoints; one for each run that is going on.

    Of several ranks all have one and call `save`. Each writes its own, into a folder that all see;
    it gets its name from rank 0, once all are through.

    Use as a context manager: leaving it waits for what is being written, and tells its error.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        keep_last: int | None = 2,
        keep_best: int = 0,
        asynchronous: bool = True,
        timeout_s: float = 1800,
    ) -> None:
        """Make the folder if there is none, and remove what a killed process left in it.

        Args:
            folder: of this run's checkpoints.
            every_steps, every_minutes: when one is due: whichever comes first; None for never.
            keep_last: how many of the newest are kept; None for all.
            keep_best: how many of those with the least metric are kept besides.
            asynchronous: write in a thread while training goes on; at most one at a time.
            timeout_s: how long rank 0 waits, after it has written, for the others.

        Raises:
            UserError: `keep_last` is less than 1.
        """
        if keep_last is not None and keep_last < 1:
            raise UserError(f"`checkpoint.keep_last={keep_last}`: keep 1 or more, or null for all")
        self.folder = Path(folder)
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._writing: Future[None] | None = None
        self._last = time.monotonic()
        if not is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f".{PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint, now that `step` steps were taken."""
        minutes = (time.monotonic() - self._last) / 60
        return (self.every_steps is not None and step % self.every_steps == 0) or (
            self.every_minutes is not None and minutes >= self.every_minutes
        )

    def save(
        self,
        state: HasSnapshot,
        *,
        export: Callable[[Path], object] | None = None,
        metric: float | None = None,
    ) -> None:
        """Write a checkpoint of the state as it is now; all ranks must call.

        Copies the state, calls `export`, and, if asynchronous, returns while it is being written.
        Waits first for the one before. A checkpoint of the same step that can be read stays.

        Args:
            export: writes into the folder it is given what other programs read. It sees the
                live program, so that training waits for it. Called on rank 0 only.
            metric: lower is better, such as the loss on held-out data; for `keep_best`.

        Raises:
            UserError: the disk is too full, now or when the one before was written, or it cannot
                be written to, on any rank. Earlier checkpoints have not been touched then.
        """
        together(self.wait)
        self._last = time.monotonic()
        path = self.folder / f"{PREFIX}{state.step:08d}"
        if from_main(is_main() and path.exists() and damage(path) is None):
            return
        snapshot = state.snapshot()
        if not is_main() and not is_spread():
            return
        temporary = self.folder / f".{path.name}{_attempt()}.tmp"
        needed = sum(count for (count,) in gathered_counts([snapshot.bytes]))
        needed += snapshot.trained_bytes if export else 0
        together(lambda: self._begin(path, temporary, needed, export))
        with _reporting(path, temporary if is_main() else None):
            together(lambda: _see(temporary))
        write = self._write if is_main() else self._write_share
        work = partial(write, snapshot, path, temporary, metric)
        if self._threads is None:
            together(work)
        else:
            self._writing = self._threads.submit(work)

    def wait(self) -> None:
        """Return when nothing is being written; raises what went wrong since the last call."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        finally:
            if self._threads is not None:
                self._threads.shutdown()

    def best(self) -> Path | None:
        """The checkpoint with the least metric, the newest of equals; None if none has one."""
        self.wait()
        ranked = _ranked(checkpoints(self.folder))
        return ranked[0] if ranked else None

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed + _MARGIN:
            raise UserError(
                f"{self.folder}: a checkpoint takes {(needed + _MARGIN) / 2**20:,.0f} MiB, and "
                f"{free / 2**20:,.0f} MiB of the disk are free; make room, the earlier checkpoints "
                "are kept"
            )

    def _begin(
        self, path: Path, temporary: Path, needed: int, export: Callable[[Path], object] | None
    ) -> None:
        if not is_main():
            return
        self._check_space(needed)
        with _reporting(path, temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            if export is not None:
                export(temporary)

    def _write(self, snapshot: Snapshot, path: Path, temporary: Path, metric: float | None) -> None:
        with _reporting(path, temporary):
            write_files(temporary, snapshot, metric, self.timeout_s)
            if path.exists():  # it was damaged, or `save` would not have come here
                _remove(path)
            temporary.rename(path)
            sync(self.folder)
        for old in self._superseded(path):
            _remove(old)

    def _write_share(self, snapshot: Snapshot, path: Path, temporary: Path, metric: object) -> None:
        with _reporting(path):
            write_share(temporary, snapshot)

    def _superseded(self, newest: Path) -> list[Path]:
        """Checkpoints that need not be kept, now that `newest` is on disk.

        Later ones are those that this run could not read, or chose not to go on with: with them
        it would not be clear where to go on the next time.
        """
        found = checkpoints(self.folder)
        earlier = [path for path in found if step_of(path) <= step_of(newest)]
        keep = set(earlier[: self.keep_last])
        if self.keep_best:
            keep |= set(_ranked(earlier)[: self.keep_best])
        return [path for path in found if path not in keep]


def _attempt() -> str:
    """What the folders of this attempt have in their name, and those of killed ones have not.

    On another machine a rank of a killed attempt may live, and write, a little longer.
    """
    return f".{from_main(secrets.token_hex(4))}" if is_spread() else ""


def _see(temporary: Path) -> None:
    """Return once this rank sees the folder that rank 0 has made; UserError if it never does."""
    end = time.monotonic() + _SEEN_S
    while not temporary.is_dir():
        if time.monotonic() > end:
            raise UserError(f"`output_dir`: {temporary.parent} is not on a disk that all ranks see")
        time.sleep(0.05)


@contextmanager
def _reporting(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Remove what was written if not all could be; a full disk is the user's to know of."""
    try:
        yield
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(
                f"{path} could not be written: {error}; the earlier checkpoints are kept"
            ) from error
        raise


def _ranked(paths: list[Path]) -> list[Path]:
    """Those that have a metric, the least first."""
    known = [(metric, path) for path in paths if (metric := metric_of(path)) is not None]
    return [path for _, path in sorted(known, key=lambda one: one[0])]


def _remove(path: Path) -> None:
    """Remove a checkpoint so that, killed in between, none is left with half of its files."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # what is left of it goes at the next start
