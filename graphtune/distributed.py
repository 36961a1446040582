"""The processes of a run: their mesh, which part of a tensor each holds, and sums over them.

A run has one mesh with four axes: `dp_replicate` (replicas of the whole model), `dp_shard` (what
shards of weights lie on), `cp` (parts of a sequence) and `tp` (parts of a matrix product); those
that a run does not use have the size 1. Ranks along `dp_replicate`, `dp_shard` and `cp` see
different tokens, ranks along `tp` the same ones.

A loss is a sum over tokens, divided by the number of tokens of all ranks. Gradients are therefore
*summed* over ranks, nowhere averaged, and are those of one process with the whole batch.

A single process has no mesh, and everything here does nothing in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.nn import functional

from graphtune.errors import UserError

AXES = ("dp_replicate", "dp_shard", "cp", "tp")
DATA_AXES = ("dp_replicate", "dp_shard", "cp")
BACKENDS = {"cuda": "nccl", "xpu": "xccl"}  # gloo for all others

_mesh: DeviceMesh | None = None


def start(
    device: torch.device, *, dp_replicate: int = 1, dp_shard: int = -1, cp: int = 1, tp: int = 1
) -> DeviceMesh | None:
    """Join the process group that a launcher such as torchrun describes, and make the run's mesh.

    Args:
        device: what this rank computes on.
        dp_replicate, dp_shard, cp, tp: sizes of the axes; -1 for `dp_shard`: all that is left.

    Returns:
        The mesh; None in a run of one process.

    Raises:
        UserError: the sizes do not make up the number of processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    if not dist.is_initialized():
        dist.init_process_group(BACKENDS.get(device.type, "gloo"))
    return make_mesh(device.type, dp_replicate=dp_replicate, dp_shard=dp_shard, cp=cp, tp=tp)


def make_mesh(
    device_type: str, *, dp_replicate: int = 1, dp_shard: int = -1, cp: int = 1, tp: int = 1
) -> DeviceMesh:
    """The run's mesh over all processes of the default process group; see `start`."""
    global _mesh
    world = dist.get_world_size()
    others = dp_replicate * cp * tp
    if dp_shard == -1:
        dp_shard = max(world // others, 1)
    if others * dp_shard != world or min(dp_replicate, dp_shard, cp, tp) < 1:
        raise UserError(
            f"mesh: dp_replicate={dp_replicate} * dp_shard={dp_shard} * cp={cp} * tp={tp} must be "
            f"the number of processes, {world}"
        )
    _mesh = init_device_mesh(device_type, (dp_replicate, dp_shard, cp, tp), mesh_dim_names=AXES)
    return _mesh


def current_mesh(key: str) -> DeviceMesh:
    """The run's mesh.

    Raises:
        UserError: there is none; the message names `key`, the option that needs it.
    """
    if _mesh is None:
        raise UserError(
            f"`{key}` needs several processes; start them with --nproc-per-node or torchrun"
        )
    return _mesh


def is_main() -> bool:
    """Whether this is the process that writes what is written once: rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def group_name(mesh: DeviceMesh, axis: str) -> str:
    """Name of this rank's process group along an axis, as operators in a graph take it."""
    return mesh.get_group(axis).group_name


def size(mesh: DeviceMesh, axis: str) -> int:
    """How many ranks there are along an axis; 1 if the mesh has no such axis."""
    return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)).get(axis, 1)


def wide(mesh: DeviceMesh, axes: Iterable[str]) -> tuple[str, ...]:
    """Those of the axes along which there is more than one rank."""
    return tuple(axis for axis in axes if size(mesh, axis) > 1)


@dataclass(frozen=True)
class Part:
    """What one rank has of a tensor: some of the indices of one dimension.

    Every rank has room for as many, `length`; the last ones may have fewer, or none, and pad with
    zeros. It is the division of `torch.chunk`, and so of DTensor.

    Attributes:
        dim: the dimension that is divided.
        size: of that dimension in the whole tensor.
        ranks, rank: among how many, and which.
        axis: of the mesh, along which the ranks lie.
        pieces: where each of several pieces of the dimension, such as q, k and v of a fused
            projection, is divided by itself, their sizes; the ranks divide each of them.
    """

    dim: int
    size: int
    ranks: int
    rank: int
    axis: str
    pieces: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return -(-self.size // self.ranks)

    @property
    def start(self) -> int:
        return min(self.rank * self.length, self.size)

    @property
    def stop(self) -> int:
        return min(self.start + self.length, self.size)

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor without padding; a view where there are no pieces."""
        if self.pieces:
            parts = (
                piece.narrow(self.dim, self.rank * size // self.ranks, size // self.ranks)
                for piece, size in zip(whole.split(self.pieces, self.dim), self.pieces, strict=True)
            )
            return torch.cat(list(parts), self.dim)
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor of the parts, without padding, of all ranks."""
        if not self.pieces:
            return torch.cat(list(parts), self.dim)
        lengths = [size // self.ranks for size in self.pieces]
        divided = [part.split(lengths, self.dim) for part in parts]
        return torch.cat([one for piece in zip(*divided, strict=True) for one in piece], self.dim)

    def of_file(self, whole: Any) -> Tensor:
        """The same of a tensor that lies in a file: what safetensors' `get_slice` returns."""
        return whole[(slice(None),) * self.dim + (slice(self.start, self.stop),)]

    def padded(self, part: Tensor) -> Tensor:
        """The part with padding, in memory of its own."""
        missing = self.length - part.shape[self.dim]
        if missing == 0:
            return part.clone(memory_format=torch.contiguous_format)
        return functional.pad(part, (0, 0) * (part.dim() - 1 - self.dim) + (0, missing))


@dataclass(frozen=True)
class Distribution:
    """How a program is spread over a mesh.

    Attributes:
        mesh: the run's.
        parts: by the name of a parameter or buffer, what this rank has of it. Of one in several
            parts (tensor parallel, then sharded) the first is of the whole, the next of what that
            leaves, and their dimensions differ. Those without an entry are the same on all ranks.
    """

    mesh: DeviceMesh
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)

    def sum(self, value: Tensor, axes: Iterable[str] = DATA_AXES) -> Tensor:
        """The sum over all ranks along the axes, by default those whose tokens differ."""
        return sum_over(self.mesh, value, axes)

    def norm(self, norms: Mapping[str, Tensor]) -> Tensor:
        """2-norm of tensors whose parts' 2-norms are given by name, each counted once."""
        totals: dict[frozenset[str], Tensor] = {}
        for name, value in norms.items():
            axes = frozenset(part.axis for part in self.parts.get(name, ()))
            totals[axes] = totals.get(axes, 0) + value.float().square()
        total = sum(self.sum(totals[axes], sorted(axes)) for axes in sorted(totals, key=sorted))
        return torch.as_tensor(total).sqrt()

    def dtensor(self, name: str, local: Tensor) -> DTensor:
        """The whole of a tensor of the program as a view of this rank's part, without padding.

        Args:
            name: of the parameter or buffer.
            local: it, its gradient, or what an optimizer keeps for it, in its shape.
        """
        parts = {part.axis: part for part in self.parts.get(name, ())}
        shape = list(local.shape)
        for part in parts.values():
            local = local.narrow(part.dim, 0, part.stop - part.start)
            shape[part.dim] = part.size
        placements: list[Placement] = [
            ShardPlacement(parts[axis].dim) if axis in parts else Replicate()
            for axis in self.mesh.mesh_dim_names or ()
        ]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local.detach(),
            self.mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=stride,
        )


def sum_over(mesh: DeviceMesh, value: Tensor, axes: Iterable[str]) -> Tensor:
    """The sum of a tensor over all ranks along the axes; a new tensor."""
    value = value.detach().clone()
    for axis in wide(mesh, axes):
        dist.all_reduce(value, group=mesh.get_group(axis))
    return value
