"""A checkpoint holds whole tensors: what ranks saved one process goes on with, and so back."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import graphtune as gt
from graphtune.distributed import is_main
from graphtune.passes import DataParallel, TensorParallel
from graphtune.program import Program
from graphtune.training.checkpoint import Checkpointer
from graphtune.training.checkpoint_files import latest, read_checkpoint
from graphtune.training.ema import EMA
from graphtune.training.state import TrainState
from tests.oracles.distributed_cases import Case, adapted, batches, distributed
from tests.oracles.ranks import World

pytestmark = pytest.mark.filterwarnings("ignore:.*on other ranks")

CASES = {
    "full": Case(model="uneven"),
    "qlora": Case(adapt="qlora"),
    "replicated": Case(adapt="lora", distribute=DataParallel),
    "divided": Case(model="phi3", distribute=TensorParallel, mesh={"tp": 2, "dp_shard": 1}),
}


def state_of(program: Program) -> TrainState:
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=1e-2)
    ema = EMA(program.named_parameters(), 0.9)
    return TrainState(program, [optimizer], {"seed": 3}, {"ema": ema})


def trained(program: Program, rank: int = 0) -> TrainState:
    """The state after two steps."""
    state = state_of(program)
    step = gt.compile_step(program, state.optimizers[0], compile=False)
    for row in batches(2, 2):
        step(row[rank])
        state.parts["ema"].update()  # type: ignore[attr-defined]
        state.step += 1
    return state


def save_on_ranks(case: Case, folder: str) -> None:
    rank = 0 if case.mesh.get("tp") else torch.distributed.get_rank()
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(trained(distributed(case), rank))


def again(program: Program, folder: str) -> tuple[dict[str, Tensor], int]:
    """Tensors of a new state that was restored, and its step."""
    state = state_of(program)
    state.restore(latest(folder))
    tensors = state.snapshot().tensors
    return dict(tensors) if is_main() else {}, state.step


def again_on_ranks(case: Case, folder: str) -> tuple[dict[str, Tensor], int]:
    return again(distributed(case), folder)


@pytest.fixture(scope="module")
def two():
    world = World(2)
    yield world
    world.stop()


def assert_same(found: tuple[dict[str, Tensor], int], folder: Path) -> None:
    description, saved = read_checkpoint(latest(folder))
    tensors, step = found
    assert step == description["step"] == 2
    own = {n for n in saved if n.partition("/")[0] not in ("rng", "rng_of_others")}
    assert len(own) > 20 and own == {n for n in tensors if not n.startswith("rng")}
    for name in own:
        assert torch.equal(tensors[name], saved[name]), name


@pytest.mark.parametrize("name", CASES)
def test_another_number_of_ranks_has_the_same_bits(name: str, two: World, tmp_path: Path) -> None:
    case = CASES[name]
    two(save_on_ranks, case, str(tmp_path / "two"))
    assert_same(again(adapted(case), str(tmp_path / "two")), tmp_path / "two")
    assert_same(two(again_on_ranks, case, str(tmp_path / "two"))[0], tmp_path / "two")
    with Checkpointer(tmp_path / "one") as checkpoints:
        checkpoints.save(trained(adapted(case)))
    assert_same(two(again_on_ranks, case, str(tmp_path / "one"))[0], tmp_path / "one")


def test_ranks_go_on_with_their_own_random_numbers(two: World, tmp_path: Path) -> None:
    two(save_on_ranks, CASES["replicated"], str(tmp_path))
    _, saved = read_checkpoint(latest(tmp_path))
    assert "rng_of_others/0/torch" in saved


def save_whole_matrices(case: Case) -> str:
    program = distributed(case)
    optimizer = torch.optim.Adafactor(program.trainable_parameters())
    state = TrainState(program, [optimizer])
    gt.compile_step(program, optimizer, compile=False)(batches(2, 1)[0][0])
    try:
        state.snapshot()
    except gt.UserError as error:
        return str(error)
    return ""


def test_state_that_is_not_elementwise_is_refused_on_every_rank(two: World) -> None:
    for message in two(save_whole_matrices, CASES["full"]):
        assert "elementwise" in message and "AdamW" in message
