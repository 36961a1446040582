"""Rows of data: which of a source's rows are taken, where each is from, and a fingerprint.

`datasets` and `graphtune.data.sources` do the loading.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
from datasets import Dataset as Table
from datasets import IterableDataset as Stream
from datasets import ReadInstruction, concatenate_datasets
from PIL.Image import Image as Picture

from graphtune.data.files import (
    PLACE,
    UNREADABLE,
    Row,
    SampleBy,
    file_stats,
    find_row,
    place_name,
)
from graphtune.data.sources import Opened, Source, open_source
from graphtune.errors import UserError

__all__ = ["PLACE", "Row", "RowOptions", "Rows", "Source", "held_out", "read_rows"]

Keep = Callable[[Row], bool]


class RowOptions(TypedDict, total=False):
    """Which rows a source gives. Every builder takes these.

    split: name of the split, `train` by default, with slices as `datasets` writes them:
        `train[:90%]`, `train[100:]`, `train+test`. Streams take slices in rows, not in percent.
    name: configuration of a hub data set.
    revision: branch, tag or commit of a hub data set.
    data_dir: folder within a hub data set or a local folder.
    data_files: files of the source: a path, a list, or a mapping of splits to either.
    sample_by: one row of a `.txt` file is a `line` (default), `paragraph` or `document`.
    streaming: read while training instead of before; nothing is kept on disk.
    filter: which rows to keep: a mapping of columns to the value, or list of values, that they
        must have; a function of the row; or that function's dotted name. Images are still files
        there, which `graphtune.data.open_image` opens.
    validation: about what share of the rows, 0 to 1, is held out of training.
    part: `train` for the rows that are not held out (default), `validation` for those that are.
    validation_seed: chooses the rows that are held out. The choice depends on the content of a
        row alone (of an image in a file of its own, on its path), so that it does not change when
        rows are added or moved, is the same for streams, and equal rows are never on both sides.
    on_bad_row: `error` (default) to stop at a row that cannot be used, `skip` to leave it out;
        how many were left out is reported.
    """

    split: str
    name: str | None
    revision: str | None
    data_dir: str | None
    data_files: str | list[str] | dict[str, str | list[str]] | None
    sample_by: SampleBy
    streaming: bool
    filter: Mapping[str, Any] | Keep | str | None
    validation: float | None
    part: Literal["train", "validation"]
    validation_seed: int
    on_bad_row: Literal["error", "skip"]


@dataclass
class Rows:
    """Rows, and where they came from.

    Attributes:
        data: the rows; streamed ones may have a `PLACE` column.
        fingerprint: changes whenever a row does; None if that cannot be told.
        on_bad_row: what to do with a row that cannot be used.
        name: the source, for messages.
        files: where the rows were read from, in order; empty if not known.
        origins: int64 (len(data),), each row's number in the source from 0; None if `data` is
            the whole source.
    """

    data: Table | Stream | list[Row]
    fingerprint: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    name: str = ""
    files: Sequence[str] = ()
    origins: np.ndarray | None = field(default=None, repr=False)
    sample_by: SampleBy = "line"

    @property
    def streaming(self) -> bool:
        return isinstance(self.data, Stream)

    def place(self, index: int) -> str:
        """Where row `index` (from 0) of `data` came from: `train.jsonl, row 12`.

        Rows count from 1. Where the line that an editor shows differs from the row, because of
        a header or of cells that span lines, it is named too. Reads files again up to there.
        """
        number = index if self.origins is None else int(self.origins[index])
        found = None if self.streaming else find_row(self.files, number, self.sample_by)
        if found is not None:
            return place_name(*found)
        return f"{self.name}, row {number + 1}" if self.name else f"row {number + 1}"


def read_rows(source: Source, **options: Unpack[RowOptions]) -> Rows:
    """Read `source`; see `Source` and `RowOptions`.

    Raises:
        UserError: no such source, split, part or filter column; a file that cannot be read; or
            no rows are left.
    """
    _check(options)
    rows = _split(open_source(source, options), options)
    rows.on_bad_row = options.get("on_bad_row", "error")
    rows.sample_by = options.get("sample_by", "line")
    if (condition := options.get("filter")) is not None:
        columns = list(condition) if isinstance(condition, Mapping) else None
        rows = _choose(rows, _condition(condition), "dataset.filter", columns)
    if (share := options.get("validation")) is not None:
        seed, part = options.get("validation_seed", 0), options.get("part", "train")

        def is_in_part(row: Row) -> bool:
            return held_out(row, share, seed) == (part == "validation")

        rows = _choose(rows, is_in_part, f"dataset.validation: {share} and dataset.part: {part!r}")
    return rows


def held_out(row: Row, share: float, seed: int = 0) -> bool:
    """Whether `row` is among the `share` of all rows that `seed` holds out, by its content."""
    try:
        digest = hashlib.sha256(f"{seed}:{_canonical(row)}".encode()).digest()
    except TypeError as error:
        raise UserError(f"dataset.validation: rows cannot be told apart: {error}") from error
    return int.from_bytes(digest[:8]) < share * 2**64


def close_match(name: str, known: Iterable[Any]) -> str:
    """The end of a message about an unknown name: the closest one, or all."""
    names = [str(item) for item in known]
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(names) == 1:
        return f"there is only {names[0]!r}"
    return f"there are {', '.join(names)}" if names else "there are none"


def _check(options: RowOptions) -> None:
    allowed = {
        "on_bad_row": ("error", "skip"),
        "part": ("train", "validation"),
        "sample_by": ("line", "paragraph", "document"),
    }
    for key, values in allowed.items():
        value = options.get(key, values[0])
        if value not in values:
            raise UserError(f"dataset.{key}: {value!r} is unknown; use {' or '.join(values)}")
    share = options.get("validation")
    if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1):
        raise UserError(f"dataset.validation: {share!r} is no share; use a number from 0 to 1")
    if share is None and options.get("part") == "validation":
        raise UserError("dataset.part: nothing is held out; set dataset.validation to a share")


# Splits


def _split(opened: Opened, options: RowOptions) -> Rows:
    spec = options.get("split", "train")
    if any(isinstance(data, Stream) for data in opened.splits.values()):
        return Rows(_slice_stream(opened, spec), name=opened.name)
    lengths = {name: len(data) for name, data in opened.splits.items()}
    try:
        parts = [
            (
                part.splitname,
                part.from_ or 0,
                lengths[part.splitname] if part.to is None else part.to,
            )
            for part in ReadInstruction.from_spec(spec).to_absolute(lengths)
        ]
    except (ValueError, AssertionError, TypeError) as error:
        raise _no_split(opened, spec) from error
    names = list(dict.fromkeys(name for name, _, _ in parts))
    starts = dict(zip(names, np.cumsum([0, *(lengths[name] for name in names)]), strict=False))
    pieces = [_piece(opened.splits[name], start, stop) for name, start, stop in parts]
    data: Any = concatenate_datasets(pieces) if isinstance(pieces[0], Table) else sum(pieces, [])
    if not len(data):
        what = f"split {spec!r} of {opened.name!r}" if opened.name else "the source"
        raise UserError(f"dataset: {what} holds no rows")
    files = [file for name in names for file in opened.files.get(name, [])]
    return Rows(
        data,
        fingerprint=_fingerprint([opened.splits[name] for name in names], files, parts),
        name=f"{opened.name} ({spec})" if opened.name else "",
        files=files,
        origins=np.concatenate([starts[name] + np.arange(a, b) for name, a, b in parts]),
    )


def _piece(data: Any, start: int, stop: int) -> Any:
    if stop - start == len(data):
        return data
    return data.select(range(start, stop)) if isinstance(data, Table) else data[start:stop]


def _slice_stream(opened: Opened, spec: str) -> Stream:
    match = re.fullmatch(r"\s*(\w+)\s*(?:\[\s*(\d*)\s*:\s*(\d*)\s*\])?\s*", spec)
    if match is None:
        raise UserError(
            f"dataset.split: {spec!r} cannot be streamed; take one split, sliced in rows if at "
            "all, such as 'train[1000:]'"
        )
    name, start, stop = match.groups()
    if name not in opened.splits:
        raise _no_split(opened, name)
    data: Any = opened.splits[name]
    data = data.take(int(stop)) if stop else data
    return data.skip(int(start)) if start else data


def _no_split(opened: Opened, spec: str) -> UserError:
    where = f" of {opened.name!r}" if opened.name else ""
    name = re.split(r"[\[+ ]", spec)[0]
    hint = close_match(name, opened.splits) if name not in opened.splits else "check the slice"
    return UserError(f"dataset.split: there is no split {spec!r}{where}; {hint}")


# Which rows are kept


def _condition(condition: Mapping[str, Any] | Keep | str) -> Keep:
    """What `filter` means, as a function of the row. Unreadable rows stay, to be reported."""
    if isinstance(condition, Mapping):
        wanted = {
            column: list(value) if isinstance(value, list | tuple | set) else [value]
            for column, value in condition.items()
        }
        return lambda row: (
            UNREADABLE in row
            or all(
                _is_one_of(_filter_cell(row, column), values) for column, values in wanted.items()
            )
        )
    if isinstance(condition, str):
        try:
            condition = pkgutil.resolve_name(condition)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"dataset.filter: {condition!r} names no function ({error}); use a dotted path, "
                "or a mapping of columns to values"
            ) from error
    if not callable(condition):
        raise UserError(f"dataset.filter: {condition!r:.60} is no function of a row")
    keep = condition
    return lambda row: UNREADABLE in row or bool(keep(row))


def _filter_cell(row: Row, column: str) -> Any:
    if column not in row:
        known = [name for name in row if name != PLACE]
        raise UserError(
            f"dataset.filter: the rows have no column {column!r}; {close_match(column, known)}"
        )
    return row[column]


def _is_one_of(cell: Any, values: list[Any]) -> bool:
    # Cells of CSV files are text, whatever the config's values are.
    return cell in values or (isinstance(cell, str) and cell in map(str, values))


def _choose(rows: Rows, keep: Keep, key: str, columns: list[str] | None = None) -> Rows:
    """The rows that `keep` is true of; `columns` are those that it looks at (None: all)."""
    data = rows.data
    if isinstance(data, Stream):
        rows.data = data.filter(keep)
        return rows
    if isinstance(data, Table):
        view = data
        if columns is not None:
            for column in columns:
                _filter_cell(dict.fromkeys(data.column_names), column)
            view = data.select_columns(columns)
        # `map` keeps its result on disk, so that the rows are gone through once.
        answers = view.map(lambda row: {"keep": keep(row)}, remove_columns=view.column_names)
        mask = np.asarray(answers["keep"][:], dtype=bool)
    else:
        mask = np.fromiter((keep(row) for row in data), dtype=bool, count=len(data))
    kept = np.flatnonzero(mask)
    if not len(kept):
        raise UserError(f"{key}: none of the {len(data)} rows is left")
    if len(kept) == len(data):
        return rows
    origins = kept if rows.origins is None else rows.origins[kept]
    return Rows(
        data.select(kept) if isinstance(data, Table) else [data[i] for i in kept],
        fingerprint=rows.fingerprint and _hash([rows.fingerprint, origins.tobytes().hex()]),
        on_bad_row=rows.on_bad_row,
        name=rows.name,
        files=rows.files,
        origins=origins,
        sample_by=rows.sample_by,
    )


# Fingerprints


def _fingerprint(splits: list[Any], files: list[str], parts: list[Any]) -> str | None:
    """Of tables: theirs, which follows the builder and its files; of lists: their content."""
    try:
        bases = [
            split._fingerprint
            if isinstance(split, Table)
            else _hash([_canonical(row) for row in split])
            for split in splits
        ]
    except TypeError:
        return None
    return _hash([bases, file_stats(files), parts])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _canonical(row: Row) -> str:
    """The row as text: the same for equal rows, whether read by Arrow, which fills in None for
    what is missing, or not. TypeError for what has no such form."""
    return json.dumps(
        {k: _plain(v) for k, v in row.items() if k != PLACE and v is not None}, sort_keys=True
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Picture):
        return [value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} has no fixed content")
