"""Examples of data that is read while training, resumable after any of them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import Any, NamedTuple

import datasets
import pyarrow as pa

from graphtune.data.dataset import Example, Truncate, check_piece_length, fit
from graphtune.data.fields import BadRow
from graphtune.data.rows import PLACE, Rows
from graphtune.data.table import cuts
from graphtune.errors import UserError

logger = logging.getLogger(__name__)


class StreamingDataset(ABC):
    """Examples one after another, from where the state stands; from the beginning, at first.

    When an epoch has ended, the state is that of the next one's beginning. One iteration at a
    time. The order is that of the source: `Loader` shuffles a stream, and shares it among ranks.

    Attributes:
        epoch: of the next example.
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
    def state_dict(self) -> dict[str, Any]:
        """Where the next example is, and the counts; small, and as JSON can hold it."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another stream was.

        Raises:
            UserError: it had other options.
        """

    def in_pieces(self, length: int) -> StreamingDataset:
        """Every example cut into pieces; see `Dataset.in_pieces`."""
        check_piece_length(length)
        return _Pieces(self, length)


class _Place(NamedTuple):
    """Where in the source the next row is: its number, and the source's own state if it has one."""

    row: int = 0
    source: dict[str, Any] | None = None


class RowStream(StreamingDataset):
    """Rows that are encoded when they are reached."""

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
        self.truncated = self.dropped = self.skipped = 0
        self.begin(0)

    def begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._reader = _Reader(self._rows, _Place())

    def __iter__(self) -> Iterator[Example]:
        reader = self._reader = _Reader(self._rows, self._reader.place())
        for number, row in reader:
            example = self._example(number, row)
            if example is not None:
                yield example
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

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            **self._reader.place()._asdict(),
            "counts": [self.truncated, self.dropped, self.skipped],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]
        self._reader = _Reader(self._rows, _Place(state["row"], state["source"]))
        self.truncated, self.dropped, self.skipped = state["counts"]


class _Reader:
    """Numbered rows from some row on, and where the next one is."""

    def __init__(self, rows: Rows, start: _Place) -> None:
        self._all = rows
        self._start = start
        self._next = start.row
        self._stream: datasets.IterableDataset | None = None

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        try:
            for row in self._rows():
                self._next += 1
                yield self._next - 1, row
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{self._all.place(self._next)}: it cannot be read ({error}), nor skipped in a "
                "stream; mend it, or set `streaming: false`"
            ) from error

    def _rows(self) -> Iterable[Mapping[str, Any]]:
        rows = self._all.data
        if not isinstance(rows, datasets.IterableDataset):
            return islice(rows, self._next, None)
        # All of it, as an object of its own: two iterations of one lose their places.
        self._stream = rows.shard(num_shards=1, index=0)
        self._stream.load_state_dict(self._start.source)
        # Iterated directly, it would give each worker of a data loader other files.
        batches = self._stream.iter(batch_size=1)
        return ({key: cells[0] for key, cells in batch.items()} for batch in batches)

    def place(self) -> _Place:
        if self._next == self._start.row:
            return self._start
        return _Place(self._next, self._stream.state_dict() if self._stream else None)


class _Pieces(StreamingDataset):
    """A stream's examples in pieces of `length` tokens; its state counts pieces."""

    def __init__(self, stream: StreamingDataset, length: int) -> None:
        self._stream, self._length = stream, length
        self._next_example()

    def _next_example(self) -> None:
        self._before = self._stream.state_dict()  # where the present example begins
        self._done = 0  # its pieces that were given

    def __iter__(self) -> Iterator[Example]:
        done = self._done
        for example in self._stream:
            edges = cuts(len(example["input_ids"]), self._length)
            for number, (start, end) in enumerate(pairwise(edges)):
                if number >= done:
                    self._done = number + 1
                    yield Example(
                        input_ids=example["input_ids"][start:end],
                        labels=example["labels"][start:end],
                    )
            done = 0
            self._next_example()
        self._next_example()

    def begin(self, epoch: int) -> None:
        self._stream.begin(epoch)
        self._next_example()

    @property
    def epoch(self) -> int:  # type: ignore[override]
        return self._stream.epoch

    @property
    def truncated(self) -> int:  # type: ignore[override]
        return self._stream.truncated

    @property
    def dropped(self) -> int:  # type: ignore[override]
        return self._stream.dropped

    @property
    def skipped(self) -> int:  # type: ignore[override]
        return self._stream.skipped

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self._before, "pieces": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stream.load_state_dict(state["stream"])
        self._before, self._done = dict(state["stream"]), state["pieces"]
