"""Local files read row by row, so that every problem has a row and a line.

Arrow reads whole blocks and gives up on a file with one broken line or with columns that change
type. Where it does, and where rows are streamed, the file is read here. A row that cannot be
parsed comes as `{UNREADABLE: [field, problem]}`; the formats refuse it as they do any bad row.
Bytes that are not UTF-8 are kept as lone surrogates, for the formats to name the field.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import datasets
import pyarrow as pa
from datasets import Dataset as Table
from datasets import IterableDataset as Stream
from pyarrow import parquet

from graphtune.errors import UserError

Row = Mapping[str, Any]
SampleBy = Literal["line", "paragraph", "document"]

UNREADABLE = "unreadable row"
PLACE = "__place__"
"""The column of streamed rows that says where each came from; taken off before use."""

ROW_LIMIT = 64 * 2**20  # bytes of a line, characters of a text: far above any document

_PARQUET_ROWS = 256  # that are in memory at a time

KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
}


def kind_of(path: str) -> str | None:
    """`json`, `csv`, `text` or `parquet` by the name's end, with or without `.gz`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() != ".gz"]
    return KINDS.get(suffixes[-1]) if suffixes else None


def unreadable(problem: str, field: str = "row") -> Row:
    """A row that stands for one that could not be read."""
    return {UNREADABLE: [field, problem]}


def scan(path: str, sample_by: SampleBy = "line") -> Iterator[tuple[int, Row]]:
    """The rows of a file of one of `KINDS`, each with its line, from 1 (of Parquet, its row).

    Lines without text are no rows. A `.json` file may be a list of rows, or have one
    row after another.

    Raises:
        UserError: a `.json` file whose list breaks off, after which no row can be found.
    """
    kind = kind_of(path)
    if kind == "parquet":
        yield from _scan_parquet(path)
        return
    with _open(path) as stream:
        if kind == "csv":
            yield from _scan_csv(stream, "\t" if ".tsv" in path.lower() else ",")
        elif kind == "text":
            yield from _scan_text(stream, sample_by)
        else:
            yield from _scan_json(stream, path)


def _open(path: str) -> BinaryIO:
    opener: Any = gzip.open if path.lower().endswith(".gz") else open
    opened: BinaryIO = opener(path, "rb")
    return opened


def _decode(line: bytes) -> str:
    return line.decode("utf-8-sig", errors="surrogateescape")


def _scan_json(stream: BinaryIO, path: str) -> Iterator[tuple[int, Row]]:
    number, first = 0, b""
    for first in stream:
        number += 1
        if first.strip(b"\xef\xbb\xbf \t\r\n"):
            break
    else:
        return
    whole = first.lstrip(b"\xef\xbb\xbf \t").startswith(b"[") or (
        ".jsonl" not in path.lower() and not _is_object(first)
    )
    if whole:
        yield from _scan_document(_decode(first + stream.read()), number, path)
        return
    yield number, _parse(first)
    for line in stream:
        number += 1
        if line.strip():
            yield number, _parse(line)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(_decode(line)), dict)
    except ValueError:
        return False


def _parse(line: bytes) -> Row:
    if len(line) > ROW_LIMIT:
        return unreadable(f"it has {len(line):,} bytes; a row may have {ROW_LIMIT:,}")
    try:
        row = json.loads(_decode(line))
    except (ValueError, RecursionError) as error:
        return unreadable(f"not valid JSON ({_reason(error)})")
    if not isinstance(row, dict):
        return unreadable(f"must be a JSON object, not {str(row)[:40]!r}")
    return row


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _scan_document(text: str, line: int, path: str) -> Iterator[tuple[int, Row]]:
    """A list of rows, or one row after another; `line` is the number of the text's first line."""
    decoder, position, number = json.JSONDecoder(), 0, 0

    def skip(characters: str) -> None:
        nonlocal position, line
        while position < len(text) and text[position] in characters:
            line += text[position] == "\n"
            position += 1

    skip(" \t\r\n[")
    while position < len(text) and text[position] != "]":
        number += 1
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{place_name(path, number, line)}: row: not valid JSON ({_reason(error)}); "
                "what follows in the file cannot be read, so it must be mended"
            ) from error
        if isinstance(row, dict):
            yield line, row
        elif isinstance(row, str):
            yield line, {"text": row}
        else:
            yield line, unreadable(f"must be a JSON object, not {str(row)[:40]!r}")
        line += text.count("\n", position, end)
        position = end
        skip(" \t\r\n,")


def _scan_csv(stream: BinaryIO, delimiter: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(ROW_LIMIT)
    lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(lines, delimiter=delimiter)
    header = next(reader, [])
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, unreadable(f"not valid CSV ({error})")
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            yield (
                line,
                unreadable(f"has {len(cells)} cells, but the header names {len(header)} columns"),
            )
        else:
            yield line, dict(zip(header, cells, strict=True))


def _scan_text(stream: BinaryIO, sample_by: SampleBy) -> Iterator[tuple[int, Row]]:
    if sample_by == "document":
        if (text := _decode(stream.read())).strip():
            yield 1, {"text": text}
        return
    lines: list[str] = []
    start = 1
    for number, raw in enumerate(stream, start=1):
        line = _decode(raw).rstrip("\r\n")
        if line.strip():
            start = start if lines else number
            lines.append(line)
        if lines and (sample_by == "line" or not line.strip()):
            yield start, {"text": "\n".join(lines)}
            lines = []
    if lines:
        yield start, {"text": "\n".join(lines)}


def _scan_parquet(path: str) -> Iterator[tuple[int, Row]]:
    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_PARQUET_ROWS):
            for index in range(len(batch)):
                number += 1
                yield number, _parquet_row(batch, index)


def _parquet_row(batch: pa.RecordBatch, index: int) -> Row:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except UnicodeDecodeError as error:
            return unreadable(f"not valid UTF-8 ({error.reason})", name)
    return row


def text_table(paths: list[str], sample_by: SampleBy) -> Table:
    """CSV or plain text files as a table of text; ValueError where a row does not fit."""
    columns = dict.fromkeys(column for path in paths for column in _columns(path, sample_by))
    table = Table.from_generator(
        _readable,
        features=datasets.Features({column: datasets.Value("string") for column in columns}),
        gen_kwargs={"paths": [tuple(paths)], "stats": [file_stats(paths)], "sample_by": sample_by},
    )
    assert isinstance(table, Table)
    return table


def _columns(path: str, sample_by: SampleBy) -> Iterable[str]:
    _, first = next(scan(path, sample_by), (0, {}))
    return first


def _readable(paths: list[tuple[str, ...]], stats: Any, sample_by: SampleBy) -> Iterator[Row]:
    """`stats` is there for the cache's key alone."""
    for path in paths[0]:
        for _, row in scan(path, sample_by):
            if UNREADABLE in row:
                raise ValueError(row[UNREADABLE])
            yield row


def scan_streams(files: Mapping[str, list[str]], sample_by: SampleBy) -> dict[str, Stream]:
    return {
        split: Stream.from_generator(_placed, gen_kwargs={"paths": paths, "sample_by": sample_by})
        for split, paths in files.items()
    }


def _placed(paths: list[str], sample_by: SampleBy) -> Iterator[Row]:
    for path in paths:
        for number, (line, row) in enumerate(scan(path, sample_by), start=1):
            yield {**row, PLACE: place_name(path, number, line)}


def file_stats(paths: Iterable[str]) -> list[tuple[str, int, int]]:
    """Path, size and time of change (ns) of each file."""
    stats = [(path, os.stat(path)) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def find_row(
    paths: Iterable[str], number: int, sample_by: SampleBy = "line"
) -> tuple[str, int, int | None] | None:
    """Row `number` (from 0) of all files' rows: its file, its number there from 1, its line.

    None if there are fewer rows. Parquet files have no lines.
    """
    for path in paths:
        count = 0
        if kind_of(path) == "parquet":
            count = parquet.read_metadata(path).num_rows
            if number < count:
                return path, number + 1, None
        else:
            for count, (line, _) in enumerate(scan(path, sample_by), start=1):
                if count > number:
                    return path, count, line
        number -= count
    return None


def place_name(path: str, number: int, line: int | None) -> str:
    """`train.csv, row 12 (line 13)`; the line only where it differs from the row."""
    relative = os.path.relpath(path)
    shown = path if relative.startswith("..") else relative
    return f"{shown}, row {number}" + (f" (line {line})" if line not in (None, number) else "")
