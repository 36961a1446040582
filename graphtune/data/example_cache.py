"""Tokenised examples on disk, so that data is encoded once and not at every start.

An entry is `examples/KEY.arrow` in graphtune's cache, and `KEY.json` with its counts and checksum,
which is written last: an entry without it is not there yet. Nothing removes old entries.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from graphtune.cache import cache_dir
from graphtune.data.table import Part

logger = logging.getLogger(__name__)

_CHECKED_WHOLE = 1 << 30  # bytes; of longer files the size and structure are checked only


@dataclass
class Counts:
    """What became of the rows that gave no example.

    dropped: had nothing to learn in `max_length` tokens.
    skipped: were bad.
    problems: of the first bad ones, with their places.
    """

    dropped: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)


Write = Callable[[pa.RecordBatch], None]


def cache_file(**parts: Any) -> Path:
    """Where examples are, or would be, kept.

    Args:
        **parts: all that they depend on, as JSON can hold it. Our own source and the versions of
            the libraries that tokenise are added.
    """
    parts |= {"source": _source(), "versions": [version("transformers"), version("tokenizers")]}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / "examples" / f"{digest}.arrow"


@cache
def _source() -> str:
    """Hash of the code that makes examples."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def recall_or_keep(
    path: Path, build: Callable[[Write], Counts], again: Callable[[int], Any]
) -> tuple[Part, Counts]:
    """The examples at `path`; if there are none, those that `build` writes.

    Of several processes at once, one builds while the others wait. A damaged entry is built
    again; a full or read-only disk is no reason to stop: the examples are then in memory.
    """
    found = _recall(path, again)
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            found = _recall(path, again)
            if found is None:
                _keep(path, build)
                found = _recall(path, again)
    except OSError as error:
        logger.warning("examples cannot be kept in %s: %s", path, error)
    return found or in_memory(build, again)


def in_memory(build: Callable[[Write], Counts], again: Callable[[int], Any]) -> tuple[Part, Counts]:
    """The examples that `build` writes, kept nowhere."""
    batches: list[pa.RecordBatch] = []
    counts = build(batches.append)
    return Part(pa.Table.from_batches(batches), again), counts


def _recall(path: Path, again: Callable[[int], Any]) -> tuple[Part, Counts] | None:
    about = path.with_suffix(".json")
    if not about.is_file():
        return None
    try:
        entry = json.loads(about.read_text())
        if _checksum(path) != entry["checksum"]:
            raise ValueError("it is not what was written")
        part = Part.open(path, again)
        if part.table.num_rows != entry["rows"]:
            raise ValueError(f"it has {part.table.num_rows} rows instead of {entry['rows']}")
        return part, Counts(**entry["counts"])
    except (OSError, ValueError, KeyError, TypeError) as error:  # ArrowInvalid is a ValueError
        logger.warning("%s cannot be used (%s); encoding again", path, error)
        return None


def _keep(path: Path, build: Callable[[Write], Counts]) -> None:
    """Write an entry: a reader sees all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        table, about = Path(folder) / "table", Path(folder) / "about"
        writer: pa.RecordBatchStreamWriter | None = None
        rows = 0
        with table.open("wb") as stream:

            def write(batch: pa.RecordBatch) -> None:
                nonlocal writer, rows
                writer = writer or pa.ipc.new_stream(stream, batch.schema)
                writer.write_batch(batch)
                rows += batch.num_rows

            counts = build(write)
            assert writer is not None
            writer.close()
            _sync(stream)
        entry = {"checksum": _checksum(table), "rows": rows, "counts": asdict(counts)}
        with about.open("w") as file:
            json.dump(entry, file)
            _sync(file)
        os.replace(table, path)
        os.replace(about, path.with_suffix(".json"))


def _sync(stream: Any) -> None:
    """To the disk: after a power failure a renamed file could be full of zeros otherwise."""
    stream.flush()
    os.fsync(stream.fileno())


def _checksum(path: Path) -> list[int]:
    """Bytes, and the CRC-32 of them all or, in a long file, of the first."""
    size = path.stat().st_size
    left, crc = min(size, _CHECKED_WHOLE), 0
    with path.open("rb") as stream:
        while left and (block := stream.read(min(left, 1 << 20))):
            crc = zlib.crc32(block, crc)
            left -= len(block)
    return [size, crc]


def _lock(path: Path) -> AbstractContextManager[Any]:
    """Hold the entry, where the file system has locks; without, the last writer wins."""
    try:
        return FileLock(path.with_suffix(".lock")).acquire()
    except NotImplementedError:
        return nullcontext()
