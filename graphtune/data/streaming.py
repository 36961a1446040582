"""Examples of data that is read while training: resumable, shuffled, shared among ranks."""

from __future__ import annotations

import copy
import logging
import random
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Self

import datasets
from torch.utils.data import IterableDataset, get_worker_info

from graphtune.data.dataset import Example, Truncate, fit
from graphtune.data.messages import BadRow
from graphtune.data.rows import PLACE, Rows
from graphtune.errors import UserError

logger = logging.getLogger(__name__)


class StreamingDataset(IterableDataset[Example]):
    """Examples one after another, from where the state stands; from the beginning, at first.

    When an epoch has ended, the state is that of the next one's beginning. One iteration at a
    time.

    Attributes:
        epoch: of the next example; it changes the order, if that is shuffled.
        truncated, dropped, skipped: as of `Dataset`, of the rows read so far.
    """

    epoch: int
    truncated: int
    dropped: int
    skipped: int

    @abstractmethod
    def __iter__(self) -> Iterator[Example]:
        """The rest of the epoch."""

    @abstractmethod
    def begin(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""

    @abstractmethod
    def shard(self, rank: int, world: int) -> Self:
        """The share of one rank. Worker processes of a torch data loader split it further."""

    @abstractmethod
    def shuffle(self, buffer: int, seed: int) -> Self:
        """In an order that depends on the epoch too; no row moves by more than `buffer`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the next example is, and the counts; small, and as JSON can hold it."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another stream was.

        Raises:
            UserError: it was another rank's, of another number of ranks, or in another order.
        """


class RowStream(StreamingDataset):
    """Rows that are encoded when they are reached.

    Row i belongs to rank i % world. To shuffle, a rank reads its next `buffer` rows, whose
    order is a function of the seed, the epoch and their number; so the state is where
    they begin, and how many of them are done.
    """

    def __init__(
        self,
        rows: Rows,
        encode: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        *,
        max_length: int | None,
        truncate: Truncate = "right",
    ) -> None:
        self._rows = rows
        self._encode = encode
        self._max_length = max_length
        self._truncate: Truncate = truncate
        self._rank, self._world = 0, 1
        self._buffer, self._seed = 1, 0
        self.truncated = self.dropped = self.skipped = 0
        self.begin(0)

    def begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._source_state: dict[str, Any] | None = None  # of the source, where the block begins
        self._row = 0  # the source's row there
        self._block = 0  # number of the block
        self._done = 0  # rows of the block that are done

    def shard(self, rank: int, world: int) -> RowStream:
        return self._copy(_rank=rank, _world=world)

    def shuffle(self, buffer: int, seed: int) -> RowStream:
        if buffer < 1:
            raise UserError(f"dataset: a shuffle buffer of {buffer} rows is none; use 1 or more")
        return self._copy(_buffer=buffer, _seed=seed)

    def _copy(self, **changes: Any) -> RowStream:
        other = copy.copy(self)
        other.__dict__ |= changes
        other.begin(0)
        return other

    def __iter__(self) -> Iterator[Example]:
        source = _Source(self._rows.data, self._row, self._source_state)
        shard, shards = worker_share(self._rank, self._world)
        mine = ((number, row) for number, row in source if number % shards == shard)
        while block := list(islice(mine, self._buffer)):
            order = list(range(len(block)))
            if self._buffer > 1:
                random.Random(f"{self._seed}:{self.epoch}:{self._block}").shuffle(order)
            for place in order[self._done :]:
                self._done += 1
                example = self._example(*block[place])
                if example is not None:
                    yield example
            self._source_state, self._row = source.state()
            self._block, self._done = self._block + 1, 0
        if self.skipped > 1:
            logger.warning("dataset: %d bad rows were skipped so far", self.skipped)
        self.begin(self.epoch + 1)

    def _example(self, number: int, row: Mapping[str, Any]) -> Example | None:
        """One row's, or None if it has none."""
        place = row.get(PLACE)
        row = {key: cell for key, cell in row.items() if key != PLACE}
        try:
            example, cut = fit(self._encode(row), self._max_length, self._truncate)
        except UserError as error:
            message = f"{place or self._rows.place(number)}: {error}"
            if not isinstance(error, BadRow) or self._rows.on_bad_row == "error":
                raise UserError(message) from error
            self.skipped += 1
            if self.skipped == 1:
                logger.warning("dataset: a bad row is skipped, as others will be: %s", message)
            return None
        self.truncated += cut and example is not None
        self.dropped += example is None
        return example  # type: ignore[return-value]

    def _layout(self) -> list[int]:
        return [*worker_share(self._rank, self._world), self._buffer, self._seed]

    def state_dict(self) -> dict[str, Any]:
        return {
            "layout": self._layout(),
            "epoch": self.epoch,
            "source": self._source_state,
            "row": self._row,
            "block": self._block,
            "done": self._done,
            "counts": [self.truncated, self.dropped, self.skipped],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_layout(state["layout"], self._layout())
        self.epoch = state["epoch"]
        self._source_state, self._row = state["source"], state["row"]
        self._block, self._done = state["block"], state["done"]
        self.truncated, self.dropped, self.skipped = state["counts"]


def worker_share(rank: int, world: int) -> tuple[int, int]:
    """A rank's number and that of all, with each worker process of a data loader as a rank."""
    worker = get_worker_info()
    if worker is None:
        return rank, world
    return rank + world * worker.id, world * worker.num_workers


def check_layout(saved: Sequence[Any], own: Sequence[Any]) -> None:
    """Raises UserError if a state belongs to another share or order of a stream."""
    if list(saved) != list(own):
        raise UserError(
            f"dataset: the saved place in the stream is of rank {saved[0]} of {saved[1]} with the "
            f"options {saved[2:]}, but this is rank {own[0]} of {own[1]} with {own[2:]}; "
            "resume with the same"
        )


class _Source:
    """Numbered rows from some row on, and where the next one is."""

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], row: int, state: dict[str, Any] | None
    ) -> None:
        self._next = row
        if isinstance(rows, datasets.IterableDataset):
            # All of it, as an object of its own: two iterations of one lose their places.
            self._stream = rows.shard(num_shards=1, index=0)
            self._stream.load_state_dict(state)
            # Iterated directly, it would give each worker of a data loader other files.
            batches = self._stream.iter(batch_size=1)
            self._rows: Iterator[Mapping[str, Any]] = (
                {key: cells[0] for key, cells in batch.items()} for batch in batches
            )
        else:
            self._stream = None
            self._rows = islice(rows, row, None)

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for row in self._rows:
            self._next += 1
            yield self._next - 1, row

    def state(self) -> tuple[dict[str, Any] | None, int]:
        """The source's own state, if it has one, and the number of the next row."""
        return self._stream.state_dict() if self._stream is not None else None, self._next
