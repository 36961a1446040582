"""How examples lie in Arrow tables, and how they are read back without copying a token.

Tokens, labels and weights are columns of lists; those of a pair `chosen.input_ids`,
`rejected.labels` and so on. An empty list stands for a key that an example lacks. What is not
tokens is kept as JSON. Images are not kept: their tensors are too big.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from graphtune.errors import UserError

IMAGES = "images"

_REST, _ROW, _CUT, _AGAIN = "rest", "row", "cut", "again"


class Stored(NamedTuple):
    """An example on its way into a table.

    example: without its images.
    row: number of the row that it was made of.
    cut: whether it was truncated.
    again: whether it has images, and so must be made again when it is read.
    """

    example: Mapping[str, Any]
    row: int
    cut: bool
    again: bool


@dataclass(frozen=True)
class Part:
    """A table of examples.

    Attributes:
        table: what `to_batch` made.
        again: row number -> whole example, for examples with images.
        path: the file that `table` maps into memory, if it does; pickled instead of the table.
    """

    table: pa.Table
    again: Callable[[int], Any] | None = None
    path: Path | None = None

    @classmethod
    def open(cls, path: Path, again: Callable[[int], Any] | None = None) -> Part:
        """Map a file (Arrow's stream format) into memory; raises pyarrow.ArrowInvalid."""
        with pa.memory_map(str(path)) as source:
            return cls(pa.ipc.open_stream(source).read_all(), again, path)

    def in_pieces(self, length: int) -> Part:
        """The same tokens in examples of `length` or less; there must be no images."""
        batches = [_split_batch(batch, length) for batch in self.table.to_batches()]
        return Part(pa.Table.from_batches(batches))

    def __reduce__(self) -> tuple[Any, ...]:
        # What encodes rows may not be picklable, and most examples need it no more.
        again = self.again if pc.any(self.table[_AGAIN]).as_py() else None
        return (Part, (self.table, again)) if self.path is None else (Part.open, (self.path, again))


def documents(example: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What an example is made of: a pair's two examples by name, or itself, named ""."""
    if "input_ids" in example or "prompt_ids" in example:
        return {"": example}
    return {name: example[name] for name in ("chosen", "rejected")}


def token_keys(document: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that have an entry per token, if present; first that of the tokens."""
    return ("input_ids", "labels", "weights") if "input_ids" in document else ("prompt_ids",)


def to_batch(rows: Sequence[Stored]) -> pa.RecordBatch:
    """Examples of one kind, one or more, as a record batch.

    Raises:
        KeyError: they are of different kinds.
        UserError: a value that is neither tokens nor images and that JSON cannot hold.
    """
    split = [documents(row.example) for row in rows]
    columns: dict[str, pa.Array] = {}
    for name, document in split[0].items():
        for key in token_keys(document):
            values = [each[name].get(key, ()) for each in split]
            column = f"{name}.{key}" if name else key
            columns[column] = _lists(values, np.float32 if key == "weights" else np.int32)
    columns[_REST] = pa.array([_to_json(_rest(row.example)) for row in rows])
    columns[_ROW] = pa.array([row.row for row in rows], pa.int64())
    columns[_CUT] = pa.array([row.cut for row in rows])
    columns[_AGAIN] = pa.array([row.again for row in rows])
    return pa.RecordBatch.from_pydict(columns)


def _lists(values: Sequence[Any], dtype: type[np.generic]) -> pa.Array:
    offsets = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
    arrays = [np.asarray(value, dtype) for value in values]
    return pa.ListArray.from_arrays(offsets, np.concatenate(arrays))


def _rest(example: Mapping[str, Any]) -> dict[str, Any]:
    """What is not one entry per token."""
    names = [name for name in documents(example) if name]
    left_out = names or token_keys(example)
    rest = {key: value for key, value in example.items() if key not in left_out}
    return rest | {name: more for name in names if (more := _rest(example[name]))}


def _to_json(rest: dict[str, Any]) -> str:
    try:
        return json.dumps(rest, default=_plain) if rest else ""
    except (TypeError, ValueError) as error:
        raise UserError(
            f"dataset: the columns {', '.join(rest)} must hold text, numbers, lists and mappings, "
            f"not {error}"
        ) from error


def _plain(value: Any) -> Any:
    """Numbers, arrays and dates as JSON can hold them."""
    for method in ("tolist", "isoformat"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(type(value).__name__)


def cuts(size: int, length: int) -> list[int]:
    """Where to cut `size` tokens: ascending, from 0 to `size`."""
    edges = [*range(0, size, length), size]
    if len(edges) > 2 and edges[-1] - edges[-2] == 1:
        edges[-2] -= 1
    return edges


def _split_batch(batch: pa.RecordBatch, length: int) -> pa.RecordBatch:
    """The same tokens with more borders; only these are new."""
    sizes = np.diff(batch.column("input_ids").offsets.to_numpy())
    counts = np.maximum(1, -(-sizes // length))
    document = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_last = number == counts[document] - 1
    begin = number * length - (is_last & (number > 0) & (sizes[document] % length == 1))
    columns = {}
    for name in batch.schema.names:
        column = batch.column(name)
        if name in ("input_ids", "labels"):
            old = column.offsets.to_numpy()
            edges = np.append(old[document] + begin, old[-1]).astype(np.int32)
            columns[name] = pa.ListArray.from_arrays(edges, column.values)
        else:
            columns[name] = column.take(pa.array(document))
    return pa.RecordBatch.from_pydict(columns)


class Batch:
    """The examples of one record batch, as views of its memory."""

    def __init__(self, batch: pa.RecordBatch, again: Callable[[int], Any] | None) -> None:
        lists = [f.name for f in batch.schema if pa.types.is_list(f.type)]
        self.ids = [name for name in lists if name.endswith("_ids")]
        self._offsets = {name: batch.column(name).offsets.to_numpy() for name in lists}
        self._values = {name: batch.column(name).values.to_numpy() for name in lists}
        self._rest = batch.column(_REST)
        self._rows = batch.column(_ROW).to_numpy()
        self._made_again = batch.column(_AGAIN).to_numpy(zero_copy_only=False)
        self._again = again
        self.cut = batch.column(_CUT).to_numpy(zero_copy_only=False)

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self) -> np.ndarray:
        """int32, tokens of each example (examples,); of pairs (examples, 2)."""
        lengths = [np.diff(self._offsets[name]) for name in self.ids]
        return lengths[0] if len(lengths) == 1 else np.stack(lengths, axis=1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._made_again[index]:
            assert self._again is not None
            return self._again(int(self._rows[index]))
        example: dict[str, Any] = {}
        for column, offsets in self._offsets.items():
            start, end = offsets[index], offsets[index + 1]
            if end > start:
                name, _, key = column.rpartition(".")
                document = example.setdefault(name, {}) if name else example
                document[key] = self._values[column][start:end]
        rest = self._rest[index].as_py()
        for key, value in json.loads(rest).items() if rest else ():
            example[key] = {**example[key], **value} if key in example else value
        return example
