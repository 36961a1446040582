"""DataParallel on two processes against one process, and its collectives, counted."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from graphtune.distributed import make_mesh
from graphtune.errors import UserError
from graphtune.passes import FSDP, DataParallel
from tests.oracles.distributed_cases import (
    ADAPT,
    Case,
    adapted,
    count_collectives,
    train,
    train_all,
    train_alone,
    wrong_loss_on_one_rank,
)
from tests.oracles.models import assert_same_tensors
from tests.oracles.ranks import RankFailed, World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    started = World(2)
    yield started
    started.stop()


def case(**options: object) -> Case:
    return Case(distribute=DataParallel, **options)  # type: ignore[arg-type]


def test_ten_steps_are_those_of_one_process_bit_for_bit(world: World) -> None:
    # Two ranks: a sum of two has one order. The tied model's gradients come together first.
    cases = [case(adapt=adapt) for adapt in ADAPT] + [case(model="llama", steps=5)]
    runs = world(train_all, cases)
    for index, one in enumerate(cases):
        alone = train_alone(one, ranks=2)
        for rank in (0, 1):
            found = runs[rank][index]
            assert [m["loss"] for m in found["metrics"]] == [m["loss"] for m in alone["metrics"]]
            assert [m["tokens"] for m in found["metrics"]] == [
                m["tokens"] for m in alone["metrics"]
            ]
            assert_same_tensors(found["state"], alone["state"])


def test_clipping_is_that_of_one_process(world: World) -> None:
    one = case(clip=0.5, steps=3)
    found, alone = world(train, one)[1], train_alone(one, ranks=2)
    for mine, theirs in zip(found["metrics"], alone["metrics"], strict=True):
        assert theirs["grad_norm"] > 0.5
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapt, units", [("full", 4), ("lora", 2)])
def test_one_all_reduce_for_each_layer(world: World, adapt: str, units: int) -> None:
    # Two layers, what comes before them, and what comes after.
    forward, backward = world(count_collectives, case(adapt=adapt))[0]
    assert (forward, backward) == (Counter(), Counter({"reduce": units}))


def start_unlike() -> list[float]:
    """Sums of the trainable parameters where each rank had other ones."""
    mesh = make_mesh("cpu")
    with torch.random.fork_rng():
        torch.manual_seed(torch.distributed.get_rank())
        program = adapted(Case(adapt="full"))
        for parameter in program.parameters():
            parameter.data = parameter.data + torch.rand(())
        program = program.apply(DataParallel(mesh=mesh))
    return [float(p.double().sum()) for p in program.parameters()]


def test_all_ranks_start_from_the_first_ones_parameters(world: World) -> None:
    first, second = world(start_unlike)
    assert first == second


def fail_on_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("this one")


def test_what_is_wrong_on_one_rank_is_told_on_all(world: World) -> None:
    first, second = world(wrong_loss_on_one_rank, Case())
    assert "at the loss" in second
    assert first == f"rank 1: RuntimeError: {second}"


def test_bad_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphtune.distributed._mesh", None)
    with pytest.raises(UserError, match="reduce_dtype=int8"):
        DataParallel(reduce_dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs several processes"):
        adapted(Case(), DataParallel())
    with pytest.raises(UserError, match="needs several processes"):
        adapted(Case(), FSDP())


def test_a_failing_rank_is_told() -> None:
    world = World(2)
    with pytest.raises(RankFailed, match="(?s)rank 1 of 2.*this one"):
        world(fail_on_one)
