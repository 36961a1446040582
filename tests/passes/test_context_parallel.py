"""ContextParallel beside the same training in one process, on gloo."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import graphtune as gt
from graphtune.distributed import make_mesh
from graphtune.errors import UserError
from graphtune.losses import ContextParallelCrossEntropy
from graphtune.passes import ContextParallel
from tests.oracles.models import tiny_model
from tests.oracles.ranks import World
from tests.oracles.tensor_cases import Case, compare_all, fused, packed

TWO = {"cp": 2, "dp_shard": 1}
CASES = {
    "llama": Case("llama", mesh=TWO),
    "qwen3, lora": Case("qwen3", "lora", mesh=TWO),
}
FOUR = {
    "llama, four ranks": Case("llama", mesh={"cp": 4, "dp_shard": 1}),
    "gpt2, four ranks": Case("gpt2", mesh={"cp": 4, "dp_shard": 1}),
    "gemma2, attention by hand and windows": Case("gemma2", mesh={"cp": 4, "dp_shard": 1}),
    "wide, qlora, four ranks": Case("wide", "qlora", mesh={"cp": 4, "dp_shard": 1}),
    "qwen2, with tensor parallel": Case("qwen2", mesh={"cp": 2, "tp": 2, "dp_shard": 1}),
    "qwen2, with sequence parallel": Case(
        "qwen2", "lora", {"sequence_parallel": True}, {"cp": 2, "tp": 2, "dp_shard": 1}
    ),
}


def _run(cases: dict[str, Case], ranks: int) -> tuple[dict[str, list[Any]], Any, Any]:
    world = World(ranks)
    try:
        results = world(compare_all, list(cases.values()))
        masks = world(packed, ranks)
        losses = world(fused, "cp")
    finally:
        world.stop()
    return {name: [one[i] for one in results] for i, name in enumerate(cases)}, masks, losses


@pytest.fixture(scope="module")
def two() -> Any:
    return _run(CASES, 2)


@pytest.fixture(scope="module")
def four() -> Any:
    return _run(FOUR, 4)


def _check(results: list[Any]) -> None:
    for rank, found in enumerate(results):
        assert isinstance(found, dict), f"rank {rank}: {found}"
        assert found["greedy"] == 0
        assert found["logits"] < 1e-5, found
        for key in ("losses", "gradients", "parameters"):
            assert found[key] < (1e-6 if key != "gradients" else 5e-6), (rank, key, found)


@pytest.mark.parametrize("name", CASES)
def test_trains_as_one_process(name: str, two: Any) -> None:
    _check(two[0][name])


def test_packed_rows(two: Any) -> None:
    """Two texts in a row, whose number of tokens does not divide, with a mask of blocks."""
    assert max(two[1]) < 1e-5


def test_a_loss_in_chunks_of_each_ranks_labels(two: Any) -> None:
    for found in two[2]:
        assert len(found) == 6 and max(found.values()) < 1e-5, found


def test_gathers_keys_and_values_of_each_layer(two: Any) -> None:
    found = two[0]["llama"][0]["operators"]
    assert found["gather_balanced"] == 2 * 2
    assert found["share_balanced"] == 3  # ids, positions, the mask


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_trains_as_one_process_on_four_ranks(name: str, four: Any) -> None:
    _check(four[0][name])


def test_needs_a_sum_of_gradients() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = make_mesh("cpu", cp=2)
        split = gt.capture(tiny_model("llama")).apply(ContextParallel(mesh=mesh))
        optimizer = torch.optim.SGD(split.trainable_parameters(), lr=1e-3)
        with pytest.raises(UserError, match="add `passes.fsdp` or `passes.data_parallel`"):
            gt.compile_step(split, optimizer, loss=ContextParallelCrossEntropy())
        with pytest.raises(UserError, match="one rank to divide over"):
            gt.capture(tiny_model("llama")).apply(ContextParallel(mesh=make_mesh("cpu")))
    finally:
        dist.destroy_process_group()
