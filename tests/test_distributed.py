"""Which part of a tensor each rank has, and what a single process does: nothing."""

import pytest
import torch

from graphtune.distributed import Distribution, Part, current_mesh, is_main, start
from graphtune.errors import UserError


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_those_of_torch_chunk(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randint(1, 12, (3,), generator=generator).tolist()
    dim, ranks = int(torch.randint(3, (), generator=generator)), 1 + seed % 5
    whole = torch.rand(shape, generator=generator)
    chunks = whole.chunk(ranks, dim)
    for rank in range(ranks):
        part = Part(dim, shape[dim], ranks, rank, "dp_shard")
        mine = part.of(whole)
        if rank < len(chunks):
            assert torch.equal(mine, chunks[rank])
        else:
            assert mine.shape[dim] == 0
        padded = part.padded(mine)
        assert padded.shape[dim] * ranks >= shape[dim]
        assert torch.equal(padded.narrow(dim, 0, mine.shape[dim]), mine)
        assert padded.narrow(dim, mine.shape[dim], padded.shape[dim] - mine.shape[dim]).sum() == 0


def test_one_process_has_no_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start(torch.device("cpu")) is None
    assert is_main()
    monkeypatch.setattr("graphtune.distributed._mesh", None)
    with pytest.raises(UserError, match="`passes.fsdp` needs several processes"):
        current_mesh("passes.fsdp")


def test_a_norm_counts_each_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(0, 8, 2, 0, "dp_shard")
    distribution = Distribution(None, {"sharded": (part,)})  # type: ignore[arg-type]
    # Two ranks with equal shards: a sum over their axis doubles.
    monkeypatch.setattr(
        Distribution, "sum", lambda self, value, axes: value * 2 if list(axes) else value
    )
    norms = {"sharded": torch.tensor(3.0), "whole": torch.tensor(4.0)}
    assert float(distribution.norm(norms)) == pytest.approx((2 * 9 + 16) ** 0.5)
