"""What ranks saved, each its share, one process goes on with, and so back."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import graphtune as gt
from graphtune.distributed import is_main
from graphtune.passes import DataParallel, TensorParallel
from graphtune.program import Program
from graphtune.training import checkpoint_files
from graphtune.training.checkpoint import Checkpointer, resumed
from graphtune.training.checkpoint_files import damage, latest, read_checkpoint
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


def whole(state: TrainState) -> dict[str, Tensor]:
    """What trains, with its state and averages, by path; put together by collectives."""
    program = state.program
    parameters = {n: p.detach() for n, p in program.named_parameters() if p.requires_grad}
    kept = state.optimizers[0].state
    kinds = {
        "parameters": parameters,
        "parts/ema": state.parts["ema"].state_dict(),
        **{f"optimizers/0/state/{name}": kept[program.get_parameter(name)] for name in parameters},
    }
    found = {}
    for kind, tensors in kinds.items():
        for key, value in tensors.items():
            name = key if key in parameters else kind.rpartition("/")[2]
            divided = program.distribution is not None and value.dim() > 0
            tensor = program.distribution.whole(name, value) if divided else value
            found[f"{kind}/{key}"] = tensor.clone()
    return found


def save_on_ranks(case: Case, folder: str) -> tuple[dict[str, Tensor], int]:
    """What was saved, on rank 0, and the bytes that this rank had to write."""
    rank = 0 if case.mesh.get("tp") else torch.distributed.get_rank()
    state = trained(distributed(case), rank)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state)
    snapshot = state.snapshot()
    saved = whole(state)
    return saved if is_main() else {}, snapshot.bytes


def again(program: Program, folder: str) -> tuple[dict[str, Tensor], int]:
    """What a state has that was restored, and its step."""
    state = state_of(program)
    state.restore(latest(folder))
    tensors = whole(state)
    return tensors if is_main() else {}, state.step


def again_on_ranks(case: Case, folder: str) -> tuple[dict[str, Tensor], int]:
    return again(distributed(case), folder)


@pytest.fixture(scope="module")
def two():
    world = World(2)
    yield world
    world.stop()


def assert_same(found: tuple[dict[str, Tensor], int], expected: dict[str, Tensor]) -> None:
    tensors, step = found
    assert step == 2
    assert len(expected) > 20 and tensors.keys() == expected.keys()
    for name in expected:
        assert torch.equal(tensors[name], expected[name]), name


@pytest.mark.parametrize("name", CASES)
def test_another_number_of_ranks_has_the_same_bits(name: str, two: World, tmp_path: Path) -> None:
    case = CASES[name]
    saved, _ = two(save_on_ranks, case, str(tmp_path / "two"))[0]
    assert_same(again(adapted(case), str(tmp_path / "two")), saved)
    assert_same(two(again_on_ranks, case, str(tmp_path / "two"))[0], saved)
    alone = trained(adapted(case))
    with Checkpointer(tmp_path / "one") as checkpoints:
        checkpoints.save(alone)
    assert_same(two(again_on_ranks, case, str(tmp_path / "one"))[0], whole(alone))


def test_each_rank_has_and_writes_its_share_alone(two: World, tmp_path: Path) -> None:
    case = CASES["full"]
    (saved, first), (_, second) = two(save_on_ranks, case, str(tmp_path))
    everything = sum(tensor.nbytes for tensor in saved.values())
    folder = latest(tmp_path)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert files.keys() == {"state.json", "state-rank-0.safetensors", "state-rank-1.safetensors"}
    header = 64 * 2**10
    same_on_all = sum(tensor.nbytes for tensor in saved.values() if tensor.dim() < 2) + 2**14
    for rank, held in enumerate((first, second)):
        assert held <= everything / 2 + same_on_all
        assert held < files[f"state-rank-{rank}.safetensors"] < held + header
    assert second <= everything / 2


def restored_meanwhile_counting(case: Case, folder: str) -> tuple[int, int]:
    """Elements that this rank read to go on, and those of everything that it has."""
    state = state_of(distributed(case))
    read = []
    get = checkpoint_files.StoredTensors.__getitem__

    def counting(self: object, path: str) -> Tensor:
        value = get(self, path)
        read.append(value.numel() if path.startswith("parameters/") else 0)
        return value

    with patch.object(checkpoint_files.StoredTensors, "__getitem__", counting):
        state.restore(latest(folder))
    return sum(read), sum(p.numel() for p in state.program.parameters())


def test_a_rank_reads_only_what_it_has(two: World, tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(trained(adapted(CASES["full"])))
    for read, has in two(restored_meanwhile_counting, CASES["full"], str(tmp_path)):
        assert read == has


@pytest.mark.parametrize("spoil", ["truncate", "remove"])
def test_without_a_ranks_file_the_checkpoint_before_is_taken(
    spoil: str, two: World, tmp_path: Path
) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        state = trained(adapted(CASES["full"]))
        state.step = 1
        checkpoints.save(state)
    two(save_on_ranks, CASES["full"], str(tmp_path))
    newest = latest(tmp_path)
    assert newest is not None and newest.name == "step-00000002"
    file = newest / "state-rank-1.safetensors"
    if spoil == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="cannot be used: state-rank-1.safetensors"):
        assert latest(tmp_path) == tmp_path / "step-00000001"


def found_on_ranks(folder: str) -> tuple[list[str], list[str]]:
    """Files that this rank hashes to go on with what is in a folder, and what it then has, or the
    error."""
    hashed = []
    sha256 = checkpoint_files._sha256

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    with patch.object(checkpoint_files, "_sha256", counting):
        try:
            found = resumed("auto", folder)
        except gt.UserError as error:
            return hashed, ["error", str(error)]
    return hashed, ["found", found.name]


def test_rank_0_alone_hashes_and_all_are_told(two: World, tmp_path: Path) -> None:
    two(save_on_ranks, CASES["full"], str(tmp_path))
    files = ["state-rank-0.safetensors", "state-rank-1.safetensors"]
    (first, found), (second, also) = two(found_on_ranks, str(tmp_path))
    assert sorted(first) == files and second == []
    assert found == also == ["found", "step-00000002"]
    file = tmp_path / "step-00000002" / files[1]
    *most, last = file.read_bytes()
    file.write_bytes(bytes([*most, last ^ 0xFF]))  # of the right size
    for _, (kind, message) in two(found_on_ranks, str(tmp_path)):
        assert kind == "error" and "every checkpoint is damaged" in message


def blind_on_rank_1(folder: str) -> str:
    """The error of ranks of which one does not see the other's file."""
    look = checkpoint_files._read_description

    def without(path: Path) -> dict:
        if not is_main():
            raise FileNotFoundError(2, "No such file or directory")
        return look(path)

    with patch.object(checkpoint_files, "_read_description", without):
        try:
            resumed("auto", folder)
        except gt.UserError as error:
            return str(error)
    return ""


def test_a_rank_that_does_not_see_the_checkpoint_stops_all(two: World, tmp_path: Path) -> None:
    two(save_on_ranks, CASES["full"], str(tmp_path))
    for message in two(blind_on_rank_1, str(tmp_path)):
        assert "as this rank sees it" in message and "all machines share" in message


def save_beside_stale(case: Case, folder: str) -> float:
    """Seconds from the start of this rank's writing to the end; rank 1 writes late."""
    state = trained(distributed(case), torch.distributed.get_rank())
    write = checkpoint_files._write_tensors

    def late(*arguments: object) -> None:
        if not is_main():
            time.sleep(1)
        write(*arguments)

    with (
        patch("secrets.token_hex", lambda size: "stale"),
        patch.object(checkpoint_files, "_write_tensors", late),
        Checkpointer(folder) as checkpoints,
    ):
        if is_main():
            stale = Path(folder, ".step-00000002.stale.tmp")
            stale.mkdir()
            file = stale / "state-rank-1.safetensors"
            file.write_bytes(b"of another attempt")
            record = json.dumps({"bytes": 18, "sha256": checkpoint_files._sha256(file)})
            file.with_name(file.name + ".record").write_text(record)
        began = time.monotonic()
        checkpoints.save(state)
        checkpoints.wait()
        return time.monotonic() - began


def test_what_a_killed_attempt_left_is_not_taken(two: World, tmp_path: Path) -> None:
    waited, _ = two(save_beside_stale, CASES["full"], str(tmp_path))
    assert waited >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert damage(tmp_path / "step-00000002") is None
    assert "parameters/lm_head.weight" in read_checkpoint(tmp_path / "step-00000002")[1]


def save_though_one_fails(case: Case, folder: str) -> list[str]:
    """What is told when rank 1 has no room, then when it does not end; then it works again."""
    state = trained(distributed(case), torch.distributed.get_rank())

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    def endless(*arguments: object) -> None:
        pass

    told = []
    for name, failing, timeout_s in (
        ("checkpoint_files.save_file", full, 600),
        ("checkpoint.write_share", endless, 0.2),
    ):
        with Checkpointer(folder, timeout_s=timeout_s) as checkpoints, ExitStack() as stack:
            if not is_main():
                stack.enter_context(patch(f"graphtune.training.{name}", failing))
            checkpoints.save(state)
            try:
                checkpoints.save(state)
            except gt.UserError as error:
                told.append(str(error))
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state)
    return told


def test_if_one_rank_cannot_write_all_are_told(two: World, tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        state = trained(adapted(CASES["full"]))
        state.step = 1
        checkpoints.save(state)
    for full, late in two(save_though_one_fails, CASES["full"], str(tmp_path)):
        assert "step-00000002 could not be written" in full and "No space left" in full
        assert "state-rank-1.safetensors not there after 0.2 seconds" in late
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}
    assert damage(tmp_path / "step-00000002") is None


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
