"""The loader: every example once, the same on any number of ranks, resumed exactly."""

import copy
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphtune.data.batching import Batching
from graphtune.data.collation import Batch
from graphtune.data.dataset import IGNORE_INDEX
from graphtune.data.loader import Loader
from graphtune.data.streaming import StreamingDataset
from graphtune.errors import UserError

LENGTH = 12


def make(sizes: list[int]) -> list[dict[str, Any]]:
    """Documents whose tokens are all different."""
    return [
        {"input_ids": (ids := [100 * (number + 1) + i for i in range(size)]), "labels": ids}
        for number, size in enumerate(sizes)
    ]


class Numbered(StreamingDataset):
    """A stream with another order in each epoch, as slow and as simple as can be."""

    def __init__(self, sizes: list[int]) -> None:
        self.examples = make(sizes)
        self.begin(0)

    def begin(self, epoch: int) -> None:
        self.epoch, self.place = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        turn = self.epoch % len(self.examples)
        turned = self.examples[turn:] + self.examples[:turn]
        while self.place < len(turned):
            self.place += 1
            yield turned[self.place - 1]
        self.begin(self.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]


sizes = st.lists(st.integers(1, LENGTH), min_size=1, max_size=20)
batchings = st.builds(
    Batching,
    mode=st.sampled_from(["padded", "packed", "bucketed", "padding_free"]),
    batch_size=st.integers(1, 3),
    length=st.just(LENGTH),
    shapes=st.integers(1, 3),
    shuffle=st.booleans(),
    seed=st.integers(0, 2),
    window=st.integers(1, 9),
)
streaming = st.booleans()


def loader(sizes: list[int], batching: Batching, stream: bool, **options: Any) -> Loader:
    return Loader(Numbered(sizes) if stream else make(sizes), batching, **options)


def take(loader: Loader, count: int) -> list[Batch]:
    """The next batches, over the ends of epochs."""
    found: list[Batch] = []
    while len(found) < count:
        found += islice(loader, count - len(found))
    return found


def key(batch: Batch) -> bytes:
    """All there is in a batch."""
    return pickle.dumps({name: (t.shape, t.numpy().tobytes()) for name, t in batch.items()})


def tokens(batches: list[Batch]) -> Counter[int]:
    """Tokens of batches that are trained on, with each document's first."""
    real = (batch for batch in batches if (batch["labels"] != IGNORE_INDEX).any())
    return Counter(
        token for batch in real for token in batch["input_ids"].flatten().tolist() if token
    )


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, batching=batchings, stream=streaming, world=st.sampled_from([1, 2, 4]))
def test_ranks_together_have_what_one_process_has(
    sizes: list[int], batching: Batching, stream: bool, world: int
) -> None:
    alone = loader(sizes, batching, stream)
    ranks = [loader(sizes, batching, stream, rank=r, world=world) for r in range(world)]
    for epoch in range(2):
        assert alone.epoch == epoch
        expected = list(alone)
        found = [list(rank) for rank in ranks]
        assert {len(one) for one in found} == {-(-len(expected) // world)}  # all do as many steps
        in_order = [batch for step in zip(*found, strict=True) for batch in step]
        for ours, theirs in zip(in_order, expected, strict=False):
            assert key(ours) == key(theirs)
        for surplus in in_order[len(expected) :]:
            assert (surplus["labels"] == IGNORE_INDEX).all()
            assert surplus["input_ids"].shape == expected[-1]["input_ids"].shape
        if not stream:
            assert len(alone) == len(expected) and len(ranks[0]) == len(found[0])
        counted: Counter[int] = Counter()
        for batch in expected:
            counted.update(token for token in batch["input_ids"].flatten().tolist() if token)
        assert counted == Counter(token for one in make(sizes) for token in one["input_ids"])


@settings(max_examples=80, deadline=None)
@given(
    sizes=sizes,
    batching=batchings,
    stream=streaming,
    world=st.sampled_from([1, 2, 4]),
    cuts=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    data=st.data(),
)
def test_resumed_is_uninterrupted(
    sizes: list[int],
    batching: Batching,
    stream: bool,
    world: int,
    cuts: list[int],
    data: st.DataObject,
) -> None:
    rank = data.draw(st.integers(0, world - 1))
    share = {"rank": rank, "world": world}
    expected = [
        key(batch) for batch in take(loader(sizes, batching, stream, **share), sum(cuts) + 5)
    ]
    found: list[bytes] = []
    state = loader(sizes, batching, stream, **share).state_dict()
    for count in [*cuts, 5]:
        part = loader(sizes, batching, stream, **share)
        part.load_state_dict(pickle.loads(pickle.dumps(state)))
        if data.draw(st.booleans()):
            part.peek()
        found += [key(batch) for batch in take(part, count)]
        state = part.state_dict()
    assert found == expected


@settings(max_examples=40, deadline=None)
@given(
    sizes=sizes,
    batching=batchings,
    stream=streaming,
    before=st.sampled_from([1, 2, 4]),
    after=st.sampled_from([1, 2, 4]),
    steps=st.integers(0, 4),
)
def test_a_run_may_go_on_with_other_ranks(
    sizes: list[int], batching: Batching, stream: bool, before: int, after: int, steps: int
) -> None:
    alone = loader(sizes, batching, stream)
    expected = [key(batch) for batch in alone]
    first = [loader(sizes, batching, stream, rank=r, world=before) for r in range(before)]
    for rank in first:
        take(rank, steps)
    states = [rank.state_dict() for rank in first]
    assert all(state == states[0] for state in states)
    if states[0]["epoch"] > 0 or steps == 0:
        return
    second = [loader(sizes, batching, stream, rank=r, world=after) for r in range(after)]
    for rank, state in zip(second, [states[0]] * after, strict=True):
        rank.load_state_dict(copy.deepcopy(state))
    rest = [key(batch) for step in zip(*second, strict=True) for batch in step]
    assert rest[: len(expected) - steps * before] == expected[steps * before :]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("cut", "rank", "world"), [(0, 0, 1), (1, 1, 2), (4, 0, 1), (5, 2, 4)])
def test_workers_change_nothing(stream: bool, cut: int, rank: int, world: int) -> None:
    sizes = [3, 9, 5, 2, 7, 12, 1, 4, 8, 8, 6, 2, 11]
    batching = Batching("packed", 2, LENGTH, window=5)
    share = {"rank": rank, "world": world}
    expected = [key(batch) for batch in take(loader(sizes, batching, stream, **share), cut + 4)]
    torch.manual_seed(0)
    first = loader(sizes, batching, stream, workers=2, **share)
    found = [key(batch) for batch in take(first, cut)]
    second = loader(sizes, batching, stream, workers=2, **share)
    second.load_state_dict(first.state_dict())
    found += [key(batch) for batch in take(second, 4)]
    assert found == expected
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_peeking_does_not_move() -> None:
    one = loader([3, 4, 5, 6], Batching("padded", 2, LENGTH), stream=False)
    first = one.peek()
    assert [key(batch) for batch in one][0] == key(first)
    assert key(one.peek()) != key(first) and one.epoch == 1


def test_a_state_of_something_else_is_refused() -> None:
    batching = Batching("padded", 2, LENGTH)
    state = loader([3, 4, 5], batching, stream=False).state_dict()
    loader([3, 4, 5], batching, stream=False).load_state_dict(state)
    for other in (
        loader([3, 5, 4], batching, stream=False),
        loader([3, 4, 5], Batching("padded", 1, LENGTH), stream=False),
    ):
        with pytest.raises(UserError, match="other data or options"):
            other.load_state_dict(state)


def test_bad_data_is_refused() -> None:
    batching = Batching("padded", 2, LENGTH)
    with pytest.raises(UserError, match="dataset: it holds no examples"):
        Loader([], batching)
    with pytest.raises(UserError, match="dataset.max_length: an example has 13 tokens"):
        loader([3, 13], batching, stream=False)
    with pytest.raises(UserError, match="dataset.max_length: an example has 13 tokens"):
        next(iter(loader([3, 13], batching, stream=True)))
    with pytest.raises(TypeError, match="not known in advance"):
        len(loader([3], batching, stream=True))


def test_streams_are_packed_as_tightly_as_data_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(3000, generator=generator).exp().mul(60).clamp(4, 512).int().tolist()
    found = list(loader(sizes, Batching("packed", 4, 512, window=512), stream=True))
    assert sum(sizes) / (len(found) * 4 * 512) >= 0.97


def test_masks_are_left_out_on_request():
    batching = Batching("packed", batch_size=2, length=LENGTH)
    sizes = [3, 4, 2, 5, 3]
    bare = list(loader(sizes, batching, False, masked=False))
    for one, whole in zip(bare, loader(sizes, batching, False), strict=True):
        assert whole.keys() - one.keys() == {"attention_mask"}
        assert all(torch.equal(whole[name], tensor) for name, tensor in one.items())
