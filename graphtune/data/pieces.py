"""Documents longer than a row, cut into consecutive pieces so that nothing of them is lost."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Self

import numpy as np
import pyarrow as pa

from graphtune.data.dataset import Dataset, Example
from graphtune.data.streaming import StreamingDataset
from graphtune.data.table import Part
from graphtune.errors import UserError

_SHORTEST = 4  # tokens of a piece: cuts can then always leave two or more on either side


def in_pieces(
    dataset: Dataset | StreamingDataset, length: int | None
) -> Dataset | StreamingDataset:
    """`dataset` with each example cut into pieces of `length` tokens, the last one shorter.

    As no piece may consist of a single token, which has nothing to predict, the last cut comes
    a token earlier where one would be left. The first token of a piece is not predicted.

    Args:
        dataset: examples of any length, with a label for each token and no weights or images.
        length: tokens; None leaves the examples whole.

    Raises:
        UserError: `length` is less than 4.
    """
    if length is None:
        return dataset
    if length < _SHORTEST:
        raise UserError(
            f"dataset.max_length: {length} is too short to split; use {_SHORTEST} or more"
        )
    if isinstance(dataset, StreamingDataset):
        return PieceStream(dataset, length)
    parts = [Part(_split_table(part.table, length)) for part in dataset._parts]
    return Dataset(parts, dropped=dataset.dropped, skipped=dataset.skipped)


def cuts(size: int, length: int) -> list[int]:
    """Where to cut `size` tokens: ascending, from 0 to `size`."""
    edges = [*range(0, size, length), size]
    if len(edges) > 2 and edges[-1] - edges[-2] == 1:
        edges[-2] -= 1
    return edges


def _split_table(table: pa.Table, length: int) -> pa.Table:
    return pa.Table.from_batches([_split_batch(batch, length) for batch in table.to_batches()])


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


class PieceStream(StreamingDataset):
    """A stream's examples in pieces of `length` tokens; its state counts pieces."""

    def __init__(self, source: StreamingDataset, length: int) -> None:
        self._length = length
        self._start(source)

    def _start(self, source: StreamingDataset) -> None:
        self._source = source
        self._before: dict[str, Any] = source.state_dict()  # where the present example begins
        self._done = 0  # its pieces that were given

    def __iter__(self) -> Iterator[Example]:
        done = self._done
        for example in self._source:
            edges = cuts(len(example["input_ids"]), self._length)
            for number, (start, end) in enumerate(pairwise(edges)):
                if number >= done:
                    self._done = number + 1
                    yield Example(
                        input_ids=example["input_ids"][start:end],
                        labels=example["labels"][start:end],
                    )
            done = 0
            self._start(self._source)
        self._start(self._source)

    def begin(self, epoch: int) -> None:
        self._source.begin(epoch)
        self._start(self._source)

    @property
    def epoch(self) -> int:  # type: ignore[override]
        return self._source.epoch

    @property
    def truncated(self) -> int:  # type: ignore[override]
        return self._source.truncated

    @property
    def dropped(self) -> int:  # type: ignore[override]
        return self._source.dropped

    @property
    def skipped(self) -> int:  # type: ignore[override]
        return self._source.skipped

    def shard(self, rank: int, world: int) -> Self:
        return self._over(self._source.shard(rank, world))

    def shuffle(self, buffer: int, seed: int) -> Self:
        return self._over(self._source.shuffle(buffer, seed))

    def _over(self, source: StreamingDataset) -> Self:
        other = copy.copy(self)
        other._start(source)
        return other

    def state_dict(self) -> dict[str, Any]:
        return {"source": self._before, "pieces": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._source.load_state_dict(state["source"])
        self._before, self._done = dict(state["source"]), state["pieces"]
