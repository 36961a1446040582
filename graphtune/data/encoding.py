"""Rows of data -> tokenised examples: in parallel, and once."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import torch

from graphtune.data.dataset import Dataset, Truncate, check_max_length, fit_all, nothing_left
from graphtune.data.example_cache import Counts, Write, cache_file, in_memory, recall_or_keep
from graphtune.data.fields import BadRow
from graphtune.data.rows import Rows
from graphtune.data.streaming import RowStream
from graphtune.data.table import to_batch
from graphtune.errors import UserError

logger = logging.getLogger(__name__)

_CHUNK = 256  # rows that a process encodes at a time
_ROWS_PER_WORKER = 1000  # for fewer, it takes longer to start a process than to encode them
_MOST_WORKERS = 16  # what more of them encode, one process cannot write
_NAMED = 3  # bad rows that the warning about them names


def encode_rows(
    rows: Rows,
    encode: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    *,
    key: str,
    max_length: int | None,
    truncate: Truncate = "right",
    workers: int | None = None,
) -> Dataset | RowStream:
    """Encode each row, and keep the outcome on disk for the next time.

    A row whose example has `images` is encoded again when the example is read, as their tensors
    are not kept. Rows of a stream are encoded when the stream reaches them.

    Args:
        rows: what `read_rows` returns.
        encode: row -> example (see `Example`), whole; raises BadRow.
        key: a hash of all that decides what `encode` does: tokenizer, template, columns, ...
        max_length: longer sequences are cut, in tokens; None: never.
        truncate: cut at the "right" (end) or the "left" (beginning).
        workers: processes to encode with; None: as many as there are cores and work for them.

    Raises:
        UserError: an option out of range, a bad row (unless they are to be skipped), or no
            example is left.
    """
    check_max_length(max_length)
    if truncate not in ("right", "left"):
        raise UserError(f"dataset.truncate: {truncate!r} is neither 'right' nor 'left'")
    if workers is not None and workers < 1:
        raise UserError(f"dataset.workers: {workers} processes cannot encode; use 1 or more")
    if rows.streaming:
        return RowStream(rows, encode, max_length=max_length, truncate=truncate)
    job = _Job(rows, encode, max_length, truncate)
    build = partial(_encode_all, job, workers)
    if rows.fingerprint is None:
        part, counts = in_memory(build, job.example)
    else:
        path = cache_file(
            rows=rows.fingerprint,
            encoder=key,
            max_length=max_length,
            truncate=truncate,
            on_bad_row=rows.on_bad_row,
        )
        part, counts = recall_or_keep(path, build, job.example)
    if counts.skipped:
        logger.warning(
            "dataset: %d bad rows were skipped: %s%s",
            counts.skipped,
            "; ".join(counts.problems),
            "; ..." if counts.skipped > len(counts.problems) else "",
        )
    return Dataset([part], dropped=counts.dropped, skipped=counts.skipped)


class _Encoded(NamedTuple):
    batch: pa.RecordBatch | None
    dropped: int
    bad: list[tuple[int, BadRow]]  # with their rows


@dataclass(frozen=True)
class _Job:
    """What each process needs to encode any of the rows."""

    rows: Rows
    encode: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    max_length: int | None
    truncate: Truncate

    @property
    def data(self) -> datasets.Dataset | Sequence[Mapping[str, Any]]:
        assert not isinstance(self.rows.data, datasets.IterableDataset)
        return self.rows.data

    def example(self, row: int) -> Mapping[str, Any]:
        return self.encode(self.data[row])

    def chunk(self, numbers: range) -> _Encoded:
        """Encode these rows; a bad one is the last, unless bad ones are skipped."""
        bad: list[tuple[int, BadRow]] = []
        kept, dropped = fit_all(self._examples(numbers, bad), self.max_length, self.truncate)
        return _Encoded(to_batch(kept) if kept else None, dropped, bad)

    def _examples(
        self, numbers: range, bad: list[tuple[int, BadRow]]
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        data = self.data
        rows: Iterable[Mapping[str, Any]] = (
            data.select(numbers)
            if isinstance(data, datasets.Dataset)
            else data[numbers.start : numbers.stop]
        )
        for number, row in zip(numbers, rows, strict=True):
            try:
                example = self.encode(row)
            except BadRow as error:
                bad.append((number, error))
                if self.rows.on_bad_row == "error":
                    return
            except UserError as error:
                raise type(error)(f"{self.rows.place(number)}: {error}") from error
            else:
                yield number, example


def _encode_all(job: _Job, workers: int | None, write: Write) -> Counts:
    """Encode all rows and `write` the examples in the rows' order."""
    counts = Counts()
    empty = True
    for encoded in _map(job, _count_workers(workers, len(job.data), job)):
        for row, problem in encoded.bad:
            if job.rows.on_bad_row == "error":
                raise UserError(f"{job.rows.place(row)}: {problem}") from problem
            if len(counts.problems) < _NAMED:
                counts.problems.append(f"{job.rows.place(row)}: {problem}")
        counts.skipped += len(encoded.bad)
        counts.dropped += encoded.dropped
        if encoded.batch is not None:
            write(encoded.batch)
            empty = False
    if empty and counts.skipped:
        raise UserError(
            f"dataset: of {len(job.data)} rows {counts.skipped} are bad and the rest leaves "
            f"nothing to train on; the first: {counts.problems[0]}"
        )
    if empty:
        raise nothing_left(job.max_length, counts.dropped)
    return counts


def _count_workers(workers: int | None, rows: int, job: _Job) -> int:
    if workers is None:
        workers = min(_cores(), _MOST_WORKERS, rows // _ROWS_PER_WORKER)
    workers = min(workers, -(-rows // _CHUNK))
    if workers < 2 or multiprocessing.current_process().daemon:  # which may have no children
        return 1
    if _start_method() != "fork":
        try:
            pickle.dumps(job)
        except Exception as error:  # whatever a user's function or tokenizer may raise
            logger.warning("encoding with one process, as others cannot be sent it: %s", error)
            return 1
    return workers


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_method() -> str:
    """Forked processes have the rows and the tokenizer already; only Linux forks safely."""
    return "fork" if sys.platform == "linux" else multiprocessing.get_start_method()


def _map(job: _Job, workers: int) -> Iterator[_Encoded]:
    """All chunks, encoded, in order."""
    count = len(job.data)
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    if workers == 1:
        yield from map(job.chunk, chunks)
        return
    logger.info("encoding %d rows with %d processes", count, workers)
    context = multiprocessing.get_context(_start_method())
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,))
    try:
        yield from pool.map(_chunk_of_worker, chunks)
    except BrokenProcessPool as error:
        raise UserError(
            "dataset.workers: a process that encodes rows died, perhaps for lack of memory; "
            f"use fewer than {workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_job_of_worker: _Job


def _start_worker(job: _Job) -> None:
    global _job_of_worker
    _job_of_worker = job
    # The threads of the parent do not exist in a fork, and waiting for them would never end.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _chunk_of_worker(numbers: range) -> _Encoded:
    return _job_of_worker.chunk(numbers)
