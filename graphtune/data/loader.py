"""Batches for a training loop: epoch after epoch, on any number of ranks, resumed exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from graphtune.data.batching import Batching, Plan, PlannedBatch, even_lengths, plan, row_lengths
from graphtune.data.collation import Batch, collate_examples, complete, without_targets
from graphtune.data.streaming import StreamingDataset
from graphtune.errors import UserError

State = dict[str, Any]


class Loader:
    """Iterates over one epoch, or what is left of it, in batches; then over the next.

        loader = Loader(dataset, Batching(batch_size=8, length=2048), pad_token_id=0)
        while loader.epoch < 3:
            for batch in loader:
                step(batch)
                save(loader.state_dict())

    Batch b of an epoch goes to rank b modulo `world`, and what is in it depends on the data, the
    options and the epoch alone: not on ranks or workers, both of which may change when a run is
    resumed. All ranks do the same number of steps: where the last batches do not suffice, a rank
    gets one without labels (`without_targets`). Everything else comes exactly once per epoch.

    A stream is read in windows of `batching.window` examples, each of which is laid out as a
    small data set would be; incomplete batches wait for the next window. Each rank reads and
    tokenises the whole stream, and collates its own batches.

    Args:
        dataset: a sequence of examples, pairs or questions (see `collate_examples`), with an
            attribute `lengths` (see `plan`) if it knows them; or a stream of such.
        batching: how examples share batches.
        pad_token_id: any id of the vocabulary; padding is masked.
        rank, world: which of how many processes this is.
        workers: processes that collate ahead; 0 collates when a batch is asked for. A stream
            has one at most.
        device: where batches are wanted; the attention mask is made there, not moved,
            and left out where each row holds one example: causal attention is all it needs. None
            leaves batches to be completed by the caller (see `collation.complete`).
        masked: False leaves the mask out of packed batches, too: a training step and
            `evaluate_loss` know from the positions what it would say.

    Attributes:
        epoch: of the next batch, from 0.
        masked: as given; it may be changed.

    Raises:
        UserError: an example is longer than a row, or the data set is empty.
    """

    def __init__(
        self,
        dataset: Sequence[Any] | StreamingDataset,
        batching: Batching,
        *,
        pad_token_id: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        device: torch.device | str | None = "cpu",
        masked: bool = True,
    ) -> None:
        self.batching = batching
        self.device = device
        self.masked = masked
        self.workers = workers
        share = (batching, pad_token_id, rank, world)
        self._batches: _MapBatches | _StreamBatches
        if isinstance(dataset, StreamingDataset):
            self._batches = _StreamBatches(dataset, *share)
        else:
            self._batches = _MapBatches(dataset, *share)
        self._state = self._batches.beginning()

    @property
    def epoch(self) -> int:
        return int(self._state["epoch"])

    @property
    def plan(self) -> Plan:
        """The batches of all ranks in the present epoch; not known of a stream."""
        return self._map_batches().plan(self.epoch)

    def __len__(self) -> int:
        """Batches of a rank in a whole epoch, the same for every epoch and rank.

        Raises:
            TypeError: the data is a stream.
        """
        batches = self._map_batches()
        return -(-len(batches.plan(self.epoch)) // batches.world)

    def __iter__(self) -> Iterator[Batch]:
        for batch, state in self._batches.after(self._state, self.workers):
            self._state = state
            yield self._complete(batch)

    def peek(self) -> Batch:
        """The next batch, which still comes next."""
        batch, _ = next(self._batches.after(self._state, workers=0))
        return self._complete(batch)

    def _complete(self, batch: Batch) -> Batch:
        if self.device is None:
            return batch
        # With one document in a row, padded at its end, causal attention is enough.
        return complete(batch, self.device, masked=self.masked and not self.batching.one_per_row)

    def state_dict(self) -> State:
        """Where the next batch is; the same on all ranks after the same number of batches."""
        return {"data": self._batches.key(), **self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another loader was, of any number of ranks and workers.

        Raises:
            UserError: it had other data or options.
        """
        if state["data"] != self._batches.key():
            raise UserError(
                "loader: the state is of other data or options, so its place means nothing here; "
                "resume with those of the first run"
            )
        self._state = {name: value for name, value in state.items() if name != "data"}

    def _map_batches(self) -> _MapBatches:
        if isinstance(self._batches, _StreamBatches):
            raise TypeError("the batches of a stream are not known in advance")
        return self._batches


class _MapBatches(TorchDataset[Any]):
    """One rank's batches of a data set with random access."""

    def __init__(
        self, dataset: Sequence[Any], batching: Batching, pad_token_id: int, rank: int, world: int
    ) -> None:
        if not len(dataset):
            raise UserError("dataset: it holds no examples; check its source, split and filters")
        self.dataset, self.batching, self.pad_token_id = dataset, batching, pad_token_id
        self.rank, self.world = rank, world
        self.lengths = example_lengths(dataset)
        self.sizes = row_lengths(self.lengths, batching)
        self._plan = (0, plan(self.lengths, batching, 0, self.sizes))

    def plan(self, epoch: int) -> Plan:
        if self._plan[0] != epoch:
            self._plan = (epoch, plan(self.lengths, self.batching, epoch, self.sizes))
        return self._plan[1]

    def key(self) -> str:
        return _key(self.batching, np.ascontiguousarray(self.lengths, np.int64).tobytes())

    def beginning(self) -> State:
        return {"epoch": 0, "batches": 0}

    def after(self, state: State, workers: int) -> Iterator[tuple[Batch, State]]:
        """The rest of the epoch, and the state after each batch."""
        epoch, done = state["epoch"], state["batches"]
        total = len(self.plan(epoch))
        places = range(done + self.rank, total + self.rank, self.world)
        for place, batch in zip(places, _load(self, workers, places), strict=True):
            given = place - self.rank + self.world  # to all ranks
            after = (epoch, given) if given < total else (epoch + 1, 0)
            yield batch, dict(zip(("epoch", "batches"), after, strict=True))

    def __getitem__(self, place: int) -> Batch:
        """Batch number `place` of the present epoch, or one without labels after the last."""
        plan = self._plan[1]
        batch = collate_planned(
            self.dataset, plan[min(place, len(plan) - 1)], self.batching, self.pad_token_id
        )
        return batch if place < len(plan) else without_targets(batch)


class _Ready(NamedTuple):
    """A batch of a stream: its examples, its layout, and the state that comes after it."""

    examples: Sequence[Any]
    planned: PlannedBatch
    state: State


class _StreamBatches(IterableDataset[Any]):
    """One rank's batches of a stream.

    The state holds that of the stream at the beginning of a window, the examples that an earlier
    window left, and how many batches of this window have been given out; so that resuming reads
    one window again.
    """

    def __init__(
        self, stream: StreamingDataset, batching: Batching, pad_token_id: int, rank: int, world: int
    ) -> None:
        self.stream, self.batching, self.pad_token_id = stream, batching, pad_token_id
        self.rank, self.world = rank, world
        self.sizes = even_lengths(batching)
        self.state = self._window(stream.epoch, 0, [])

    def key(self) -> str:
        return _key(self.batching)

    def beginning(self) -> State:
        return self.state

    def after(self, state: State, workers: int) -> Iterator[tuple[Batch, State]]:
        """The rest of the epoch, and the state after each batch."""
        self.state = state
        yield from _load(self, min(workers, 1))

    def __iter__(self) -> Iterator[tuple[Batch, State]]:
        group: list[_Ready] = []  # one for each rank
        for one in self._all_ranks():
            if len(group) == self.world:  # and it is not the epoch's last
                yield self._collate(group), group[-1].state
                group = []
            group.append(one)
        if group:
            window = group[-1].state["window"] + 1
            yield self._collate(group), self._window(self.stream.epoch, window, [])

    def _all_ranks(self) -> Iterator[_Ready]:
        state = self.state
        self.stream.load_state_dict(state["stream"])
        examples = iter(self.stream)
        more = True
        while more:
            fresh = list(islice(examples, self.batching.window))
            more = len(fresh) == self.batching.window
            window = [*state["carried"], *fresh]
            batches = self._plan(window, state["window"])
            complete = [one for one in batches if not more or self._is_complete(one)]
            for number, one in enumerate(complete[state["batches"] :], state["batches"] + 1):
                yield _Ready(window, one, {**state, "batches": number})
            left = [] if not more else [one for one in batches if not self._is_complete(one)]
            carried = [window[i] for one in left for row in one.rows for i in row]
            state = self._window(state["epoch"], state["window"] + 1, carried)

    def _window(self, epoch: int, number: int, carried: list[Any]) -> State:
        """The state at the beginning of a window, when the stream stands there."""
        return {
            "epoch": epoch,
            "window": number,
            "stream": self.stream.state_dict(),
            "carried": carried,
            "batches": 0,
        }

    def _plan(self, window: Sequence[Any], number: int) -> list[PlannedBatch]:
        return list(plan(example_lengths(window), self.batching, number, self.sizes))

    def _is_complete(self, batch: PlannedBatch) -> bool:
        if self.batching.mode == "padding_free":
            return len(batch.rows[0]) == self.batching.batch_size
        return len(batch.rows) == batch.height

    def _collate(self, group: list[_Ready]) -> Batch:
        one = group[min(self.rank, len(group) - 1)]
        batch = collate_planned(one.examples, one.planned, self.batching, self.pad_token_id)
        return batch if self.rank < len(group) else without_targets(batch)


def collate_planned(
    examples: Sequence[Any], batch: PlannedBatch, batching: Batching, pad_token_id: int = 0
) -> Batch:
    """A planned batch of `examples` as tensors, not yet `complete`."""
    rows = [[examples[i] for i in row.tolist()] for row in batch.rows]
    return collate_examples(
        rows, batch.height, batch.length, pad_token_id, one_per_row=batching.one_per_row
    )


def example_lengths(examples: Sequence[Any]) -> NDArray[Any]:
    """Tokens of each example, (examples,); of pairs those of both answers, (examples, 2)."""
    if hasattr(examples, "lengths"):
        return np.asarray(examples.lengths)
    return np.array([_lengths(example) for example in examples], dtype=np.int64)


def _lengths(example: Mapping[str, Any]) -> int | list[int]:
    if "chosen" in example:
        return [len(example[name]["input_ids"]) for name in ("chosen", "rejected")]
    return len(example["prompt_ids" if "prompt_ids" in example else "input_ids"])


def _load(source: TorchDataset[Any], workers: int, places: Iterable[int] | None = None) -> Any:
    """What `source` gives, loaded ahead by `workers` processes."""
    return iter(
        DataLoader(
            source,
            batch_size=None,
            sampler=places,
            num_workers=workers,
            collate_fn=_as_it_is,
            # Its own: to draw from torch's generator would change dropout after a resumption.
            generator=torch.Generator(),
        )
    )


def _as_it_is(item: Any) -> Any:
    return item


def _key(batching: Batching, data: bytes = b"") -> str:
    return hashlib.sha256(repr(batching).encode() + data).hexdigest()[:16]
