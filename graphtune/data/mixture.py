"""Several data sets as one, each with a share of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np

from graphtune.data.dataset import Dataset, Example
from graphtune.data.rows import Rows
from graphtune.data.streaming import RowStream, StreamingDataset
from graphtune.errors import UserError

Until = Literal["first_exhausted", "all_exhausted"] | int
"""How long an epoch of a mixture is: until one of its data sets has no example left, so that none
comes twice; until each has given all of its own, the smaller ones repeatedly; or so many examples.
"""


def mix(
    datasets: Sequence[Dataset | StreamingDataset],
    weights: Sequence[float] | None = None,
    *,
    until: Until = "first_exhausted",
    seed: int = 0,
) -> Dataset | StreamingDataset:
    """Examples of all `datasets`, evenly spread, in proportion to `weights`.

    Data sets in memory or on disk make one whose shares are exact. A stream among them makes the
    mixture a stream, whose shares are exact in the long run.

    Args:
        weights: shares, of any sum; None: every example exactly once.
        until: how long an epoch is.
        seed: which examples are used where not all of them are, and a stream's draws.

    Raises:
        UserError: weights that are no shares, streams without weights, or examples of
            different kinds.
    """
    _check(datasets, weights, until)
    if not any(isinstance(dataset, StreamingDataset) for dataset in datasets):
        return _mix_maps(cast(Sequence[Dataset], datasets), weights, until, seed)
    if weights is None:
        raise UserError("dataset: the length of a stream is not known; give each data set a weight")
    streams = [d if isinstance(d, StreamingDataset) else _replay(d) for d in datasets]
    return MixedStream(streams, weights, until=until, seed=seed)


def _replay(dataset: Dataset) -> RowStream:
    return RowStream(Rows(cast(Any, dataset), None), dict, max_length=None)


def _check(datasets: Sequence[Any], weights: Sequence[float] | None, until: Until) -> None:
    if not datasets:
        raise UserError("dataset: a mixture needs one data set or more")
    if weights is not None and len(weights) != len(datasets):
        raise UserError(f"dataset: {len(datasets)} data sets need as many weights, not {weights}")
    if weights is not None and not all(
        isinstance(weight, int | float) and 0 < weight < math.inf for weight in weights
    ):
        raise UserError(f"dataset: weights must be positive numbers, not {list(weights)}")
    if until not in ("first_exhausted", "all_exhausted") and not (
        isinstance(until, int) and until > 0
    ):
        raise UserError(
            f"dataset.until: {until!r} is neither 'first_exhausted' nor 'all_exhausted' nor a "
            "number of examples"
        )


def _mix_maps(
    datasets: Sequence[Dataset], weights: Sequence[float] | None, until: Until, seed: int
) -> Dataset:
    sizes = np.array([len(dataset) for dataset in datasets])
    shares = np.array(sizes if weights is None else weights, np.float64)
    shares /= shares.sum()
    if isinstance(until, int):
        edges = np.round(np.cumsum([0, *shares]) * until)  # so that they add up
        counts = np.diff(edges).astype(int)
    else:
        epochs = sizes / shares  # how long it takes to exhaust each
        total = epochs.min() if until == "first_exhausted" else epochs.max()
        counts = np.round(shares * total).astype(int)
    starts = np.cumsum([0, *sizes[:-1]])
    indices = [
        start + _take(int(size), int(count), f"{seed}:{number}")
        for number, (start, size, count) in enumerate(zip(starts, sizes, counts, strict=True))
    ]
    # Example k of n comes (k + 1/2) / n of the way through the epoch.
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    order = np.argsort(places, kind="stable")
    return Dataset.concatenate(datasets).select(np.concatenate(indices)[order])


def _take(size: int, count: int, seed: str) -> np.ndarray:
    """`count` of the numbers below `size`, each as often as the others, give or take one."""
    passes, more = divmod(count, size)
    some = sorted(random.Random(seed).sample(range(size), more))
    return np.concatenate([*([np.arange(size)] * passes), np.array(some, np.int64)])


class MixedStream(StreamingDataset):
    """Streams of which one is drawn for each example, by weight; all begin anew in each epoch.

    A draw is a function of the seed, the epoch and the number of the example.
    """

    def __init__(
        self,
        streams: Sequence[StreamingDataset],
        weights: Sequence[float],
        *,
        until: Until = "first_exhausted",
        seed: int = 0,
    ) -> None:
        self._streams = list(streams)
        self._weights = list(weights)
        self._until = until
        self._seed = seed
        self.begin(0)

    def begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._given = 0  # examples
        self._passes = [0] * len(self._streams)  # through each stream, whole ones
        for stream in self._streams:
            stream.begin(epoch)

    def __iter__(self) -> Iterator[Example]:
        streams = [iter(stream) for stream in self._streams]
        numbers = range(len(streams))
        while not isinstance(self._until, int) or self._given < self._until:
            draw = random.Random(f"{self._seed}:{self.epoch}:{self._given}")
            (number,) = draw.choices(numbers, self._weights)
            example = next(streams[number], None)
            if example is None:
                self._passes[number] += 1
                if self._is_exhausted():
                    break
                streams[number] = iter(self._streams[number])
                example = next(streams[number], None)
                if example is None:
                    raise UserError(f"dataset: data set {number + 1} of the mixture is empty")
            self._given += 1
            yield example
        self.begin(self.epoch + 1)

    def _is_exhausted(self) -> bool:
        if self._until == "first_exhausted":
            return any(self._passes)
        return self._until == "all_exhausted" and all(self._passes)

    @property
    def truncated(self) -> int:  # type: ignore[override]
        return sum(stream.truncated for stream in self._streams)

    @property
    def dropped(self) -> int:  # type: ignore[override]
        return sum(stream.dropped for stream in self._streams)

    @property
    def skipped(self) -> int:  # type: ignore[override]
        return sum(stream.skipped for stream in self._streams)

    def _options(self) -> list[Any]:
        return [self._weights, self._until, self._seed]

    def state_dict(self) -> dict[str, Any]:
        return {
            "options": self._options(),
            "epoch": self.epoch,
            "given": self._given,
            "passes": list(self._passes),
            "streams": [stream.state_dict() for stream in self._streams],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if list(state["options"]) != self._options():
            raise UserError(
                "dataset: the saved place is of a mixture with other weights, `until` or seed "
                f"({state['options']} instead of {self._options()}); resume with the same"
            )
        self.epoch, self._given = state["epoch"], state["given"]
        self._passes = list(state["passes"])
        for stream, its in zip(self._streams, state["streams"], strict=True):
            stream.load_state_dict(its)
