"""Mixtures: shares, lengths, order."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphtune.data.dataset import Dataset
from graphtune.data.mixture import MixedStream, mix
from graphtune.data.rows import Rows
from graphtune.data.streaming import RowStream
from graphtune.errors import UserError

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)
shares = st.floats(0.05, 1)


def rows(source: int, size: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [source, number], "labels": [-100, 1]} for number in range(size)]


def dataset(source: int, size: int) -> Dataset:
    return Dataset.build(rows(source, size), max_length=None)


def stream(source: int, size: int) -> RowStream:
    data: Any = rows(source, size)
    return RowStream(Rows(data, None), dict, max_length=None)


def given_by(mixture: Any) -> list[tuple[int, int]]:
    """Source and number of each example."""
    return [tuple(map(int, example["input_ids"])) for example in mixture]


@given(sizes)
def test_without_weights_every_example_comes_once(sizes: list[int]) -> None:
    mixture = mix([dataset(source, size) for source, size in enumerate(sizes)])
    everything = [(source, n) for source, size in enumerate(sizes) for n in range(size)]
    assert sorted(given_by(mixture)) == everything


@given(sizes, st.data(), st.sampled_from(["first_exhausted", "all_exhausted", 1, 30, 100]))
def test_shares_are_the_weights(sizes: list[int], data: st.DataObject, until: Any) -> None:
    weights = data.draw(st.lists(shares, min_size=len(sizes), max_size=len(sizes)))
    sources = [dataset(source, size) for source, size in enumerate(sizes)]
    mixture = mix(sources, weights, until=until)
    given = given_by(mixture)
    counts = Counter(source for source, _ in given)
    share = np.array(weights) / sum(weights)
    total = {
        "first_exhausted": min(size / s for size, s in zip(sizes, share, strict=True)),
        "all_exhausted": max(size / s for size, s in zip(sizes, share, strict=True)),
    }.get(until, until)
    for source, size in enumerate(sizes):
        assert abs(counts[source] - total * share[source]) <= (1 if total == until else 0.5) + 1e-9
        times = Counter(n for s, n in given if s == source)
        most = max(times.values(), default=0)
        assert most - min(times[n] for n in range(size)) <= 1
        if until == "first_exhausted":
            assert most <= 1
        if until == "all_exhausted":
            assert len(times) == size
    if until == total:
        assert len(given) == until
    if until == "first_exhausted":
        assert any(counts[source] == size for source, size in enumerate(sizes))


def test_shares_hold_in_every_part_of_the_epoch() -> None:
    mixture = mix([dataset(0, 60), dataset(1, 20)], [3, 1])
    sources = [source for source, _ in given_by(mixture)]
    assert all(sum(sources[start : start + 4]) == 1 for start in range(0, 80, 4))


def test_what_is_left_out_depends_on_the_seed_alone() -> None:
    sources = [dataset(0, 5), dataset(1, 50)]
    one, same, other = (given_by(mix(sources, [1, 1], seed=seed)) for seed in (0, 0, 1))
    assert one == same != other
    # These are in every process the same, whatever its hash seed is.
    assert [number for source, number in one if source == 1] == [12, 13, 36, 46, 47]


def test_a_mixture_knows_what_its_data_sets_know() -> None:
    long = Dataset.build([{"input_ids": [0] * 9, "labels": [1] * 9}] * 3, max_length=4)
    mixture = mix([long, dataset(1, 2)])
    assert isinstance(mixture, Dataset)
    assert sorted(mixture.lengths.tolist()) == [2, 2, 4, 4, 4]
    assert mixture.truncated == 3


def test_streams_are_drawn_by_weight() -> None:
    mixture = mix([stream(0, 10_000), dataset(1, 10_000)], [0.8, 0.2], until=5000, seed=1)
    given = given_by(mixture)
    assert isinstance(mixture, MixedStream) and len(given) == 5000
    assert sum(source for source, _ in given) == pytest.approx(1000, abs=5 * 28.3)  # 5 sigma
    for source in (0, 1):
        numbers = [number for s, number in given if s == source]
        assert numbers == list(range(len(numbers)))
    again = given_by(mixture)
    assert again != given and len(again) == 5000  # another epoch
    mixture.begin(0)
    assert given_by(mixture) == given


def test_when_a_mixture_of_streams_ends() -> None:
    first = given_by(mix([stream(0, 200), stream(1, 5)], [1, 1]))
    assert len(first) == len(set(first)) < 30
    longest = given_by(mix([stream(0, 200), stream(1, 5)], [1, 1], until="all_exhausted"))
    assert {n for source, n in longest if source == 0} == set(range(200))
    assert len({number for source, number in longest if source == 0}) == 200
    repeated = Counter(number for source, number in longest if source == 1)
    assert max(repeated.values()) - min(repeated.values()) <= 1 < min(repeated.values())


def test_a_mixture_has_as_many_examples_as_asked_for() -> None:
    assert len(given_by(mix([stream(0, 50), stream(1, 5)], [1, 1], until=37))) == 37


def test_counts_of_a_mixture_are_those_of_its_streams() -> None:
    long: Any = [{"input_ids": [0] * 9, "labels": [-100] * 3 + [1] * 6}] * 3
    cut = RowStream(Rows(long, None), dict, max_length=4)
    dropped = RowStream(Rows(long, None), dict, max_length=3)
    mixture = mix([cut, dropped, stream(1, 3)], [1, 1, 1], until="first_exhausted")
    list(mixture)
    assert isinstance(mixture, MixedStream)
    assert mixture.truncated == cut.truncated
    assert mixture.dropped == dropped.dropped
    assert mixture.skipped == 0


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "one data set or more"),
        ([dataset(0, 2)], {"weights": [1, 2]}, "1 data sets need as many weights"),
        ([dataset(0, 2)], {"weights": [0]}, "must be positive"),
        ([dataset(0, 2)], {"weights": [float("nan")]}, "must be positive"),
        ([dataset(0, 2)], {"weights": ["much"]}, "must be positive"),
        ([dataset(0, 2)], {"until": "longest"}, "dataset.until: 'longest'"),
        ([dataset(0, 2)], {"until": 0}, "dataset.until: 0"),
        ([dataset(0, 2), stream(1, 2)], {}, "give each data set a weight"),
    ],
)
def test_what_is_no_mixture_is_refused(sources: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mix(sources, **options)


def test_an_empty_stream_is_an_error() -> None:
    with pytest.raises(UserError, match="data set 2 of the mixture is empty"):
        list(mix([stream(0, 3), stream(1, 0)], [1, 1], until="all_exhausted"))
