"""Plans: every example once, few shapes, little padding, the same everywhere."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphtune.data.batching import Batching, Mode, plan, row_lengths
from graphtune.errors import UserError

LENGTH = 60
MODES = ("padded", "packed", "bucketed", "padding_free")
lengths = st.lists(st.integers(1, LENGTH), max_size=60)
options = st.builds(
    Batching,
    mode=st.sampled_from(MODES),
    batch_size=st.integers(1, 5),
    length=st.just(LENGTH),
    shapes=st.integers(1, 4),
    fit=st.sampled_from(["best", "first"]),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
)


@settings(deadline=None)
@given(lengths=lengths, options=options, epoch=st.integers(0, 5))
def test_every_example_once_in_few_shapes(
    lengths: list[int], options: Batching, epoch: int
) -> None:
    found = plan(lengths, options, epoch)
    used = [i for batch in found for row in batch.rows for i in row]
    assert sorted(used) == list(range(len(lengths)))
    assert len(found) == len(plan(lengths, options))
    allowed = set(row_lengths(lengths, options).tolist())
    assert len(allowed) <= (options.shapes if "d_" in options.mode else 4)
    for batch in found:
        assert batch.length in allowed
        assert 0 < len(batch.rows) <= batch.height
        assert batch.height == (1 if options.mode == "padding_free" else options.batch_size)
        for row in batch.rows:
            assert sum(lengths[i] for i in row) <= batch.length
            if options.one_per_row:
                assert len(row) == 1
            if options.mode == "padding_free":
                assert len(row) <= options.batch_size
    if lengths:
        assert found.slots == sum(batch.height * batch.length for batch in found)
        assert found.tokens == sum(lengths)


@given(lengths=lengths, options=options, epoch=st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_pairs_lie_together(lengths: list[int], options: Batching, epoch: int) -> None:
    first = np.array(lengths, np.int64) // 2  # an answer may be empty; the pair is never longer
    pairs = np.stack([first, np.array(lengths, np.int64) - first], axis=1)
    found = plan(pairs, options, epoch)
    assert sorted(i for b in found for row in b.rows for i in row) == list(range(len(lengths)))
    for batch in found:
        for row in batch.rows:
            assert batch.length >= (
                pairs[row].max() if options.one_per_row else pairs[row].sum(axis=None)
            )
    rows = 2 if options.one_per_row else 1
    assert found.slots == sum(rows * batch.height * batch.length for batch in found)


def order(mode: Mode, epoch: int = 0, seed: int = 0, shuffle: bool = True) -> list[int]:
    found = plan([2, 3] * 15, Batching(mode, 2, 6, seed=seed, shuffle=shuffle), epoch)
    return [int(i) for batch in found for row in batch.rows for i in row]


@pytest.mark.parametrize("mode", MODES)
def test_the_order_depends_on_seed_and_epoch_alone(mode: Mode) -> None:
    assert order(mode) == order(mode)
    assert len({tuple(order(mode, e, s)) for e in range(3) for s in range(3)}) == 9
    assert order(mode, 0, shuffle=False) == order(mode, 5, shuffle=False)
    if mode in ("padded", "padding_free"):
        assert order(mode, shuffle=False) == list(range(30))


def test_the_order_does_not_change_with_versions() -> None:
    """A run that is resumed with another numpy must find its place."""
    assert order("padded")[:10] == [11, 3, 20, 13, 2, 21, 15, 1, 18, 25]
    assert order("packed")[:10] == [27, 20, 2, 18, 8, 17, 23, 6, 24, 0]


def test_neighbours_in_packed_rows_change() -> None:
    rows = [
        {frozenset(row.tolist()) for b in plan([5, 4, 3, 2] * 20, PACKED, epoch) for row in b.rows}
        for epoch in range(2)
    ]
    assert len(rows[0] & rows[1]) < len(rows[0]) / 2


PACKED = Batching("packed", 2, 7)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=30), shapes=st.integers(1, 3))
def test_buckets_leave_the_least_padding(lengths: list[int], shapes: int) -> None:
    """Against every choice of multiples of 8."""
    found = row_lengths(lengths, Batching("bucketed", 1, 104, shapes=shapes))
    largest = -(-max(lengths) // 8) * 8
    assert found[-1] == largest and len(found) <= shapes

    def slots(sizes: tuple[int, ...]) -> int:
        return sum(min(size for size in sizes if size >= n) for n in lengths)

    choices = [
        (*some, largest)
        for count in range(shapes)
        for some in combinations(range(8, largest, 8), count)
    ]
    assert slots(tuple(found.tolist())) == min(map(slots, choices))


def test_each_mode_wastes_less_than_padding_does() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(5.3, 1.0, 5000)).astype(int), 8, 2048)
    waste = {mode: 1 - plan(lengths, Batching(mode, 8, 2048)).efficiency for mode in MODES}
    assert waste["packed"] < 0.02
    assert waste["padding_free"] < 0.3
    assert waste["bucketed"] < 0.4
    assert waste["padded"] > 0.8
    for mode in ("bucketed", "padding_free"):
        shapes = set.union(*(plan(lengths, Batching(mode, 8, 2048), e).shapes for e in range(8)))
        assert 2 <= len(shapes) <= 4


def test_a_million_examples() -> None:
    lengths = np.random.default_rng(0).integers(20, 1500, 1_000_000)
    found = plan(lengths, Batching("packed", 8, 2048), 1)
    assert found.efficiency > 0.98
    assert np.array_equal(np.sort(found.pack.documents), np.arange(1_000_000))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"mode": "paked"}, "loader.mode: 'paked' is none of padded, packed"),
        ({"fit": "worst"}, "loader.fit: 'worst' is none of best, first"),
        ({"batch_size": 0}, "loader.batch_size: 0 must be 1 or more"),
        ({"seed": -1}, "loader.seed: -1 must be 0 or more"),
    ],
)
def test_bad_options_are_refused(bad: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Batching(**bad)


@pytest.mark.parametrize("mode", MODES)
def test_too_long_examples_are_refused(mode: Mode) -> None:
    with pytest.raises(UserError, match="dataset.max_length: an example has 13 tokens"):
        plan([3, 13], Batching(mode, 2, 12))
