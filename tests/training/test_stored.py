"""Shards that ranks of one mesh wrote are read by ranks of another, each its own."""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from graphtune.distributed import Part
from graphtune.training.stored import StoredTensors, ranges_of

SHAPE = (12, 7)
FUSED = (4, 6, 2)  # pieces of the first dimension
MESHES = {
    "whole": (),
    "rows": (Part(0, 12, 5, 0, "dp_shard"),),  # 3, 3, 3, 3 and none
    "columns": (Part(1, 7, 3, 0, "dp_shard"),),  # 3, 3, 1
    "fused": (Part(0, 12, 2, 0, "tp", FUSED),),
    "fused and columns": (Part(0, 12, 2, 0, "tp", FUSED), Part(1, 7, 2, 0, "dp_shard")),
}


def on_ranks(parts: tuple[Part, ...]) -> Iterator[list[Part]]:
    """What each rank has."""
    for ranks in itertools.product(*(range(part.ranks) for part in parts)):
        yield [dataclasses.replace(p, rank=rank) for p, rank in zip(parts, ranks, strict=True)]


def own(whole: Tensor, parts: list[Part], *, padded: bool) -> Tensor:
    for part in parts:
        whole = part.padded(part.of(whole)) if padded else part.of(whole)
    return whole


@pytest.mark.parametrize("to", MESHES)
@pytest.mark.parametrize("by", MESHES)
def test_each_rank_reads_what_it_has(by, to, tmp_path):
    whole = torch.arange(84, dtype=torch.bfloat16).view(SHAPE)
    found = []
    for rank, parts in enumerate(on_ranks(MESHES[by])):
        file = f"state-rank-{rank}.safetensors"
        save_file({"w": own(whole, parts, padded=False).contiguous()}, tmp_path / file)
        found.append({"file": file, "ranges": ranges_of(parts, SHAPE)})
    description = {"divided": {"w": {"shape": SHAPE, "parts": found}}}
    for parts in on_ranks(MESHES[to]):
        stored = StoredTensors(tmp_path, description, lambda path, shape, parts=parts: parts)
        assert torch.equal(stored["w"], own(whole, parts, padded=True))
