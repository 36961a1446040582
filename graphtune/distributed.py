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

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.nn import functional

from graphtune import roll_call
from graphtune.errors import UserError
from graphtune.torch_private import pretended_processes

AXES = ("dp_replicate", "dp_shard", "cp", "tp")
DATA_AXES = ("dp_replicate", "dp_shard", "cp")
BATCH_AXES = ("dp_replicate", "dp_shard")  # whose ranks have other batches
BACKENDS = {"cuda": "nccl", "xpu": "xccl"}  # gloo for all others

_mesh: DeviceMesh | None = None
_joined = False  # whether the process group is ours to leave


def start(
    device: torch.device,
    *,
    dp_replicate: int = 1,
    dp_shard: int = -1,
    cp: int = 1,
    tp: int = 1,
    timeout_s: float = 1800,
    facts: Mapping[str, str] | None = None,
) -> DeviceMesh | None:
    """Join the process group that a launcher such as torchrun describes, and make the run's mesh.

    Args:
        device: what this rank computes on.
        dp_replicate, dp_shard, cp, tp: sizes of the axes; -1 for `dp_shard`: all that is left.
        timeout_s: seconds to wait for a rank, at the start and in every collective.
        facts: what must be the same on all ranks, see `graphtune.roll_call`. A process group that
            is there already, such as Ray's, is taken as it is.

    Returns:
        The mesh; None in a run of one process.

    Raises:
        UserError: the sizes do not make up the number of processes; a rank is missing, or of
            another run.
    """
    global _joined
    rank, ranks = roll_call.world()
    sizes = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp}
    _whole_sizes(sizes, ranks)
    if ranks == 1:
        return None
    if not dist.is_initialized():
        store = roll_call.connect(timeout_s)
        roll_call.call(store, facts or {}, timeout_s)
        own = BACKENDS.get(device.type)
        dist.init_process_group(
            f"cpu:gloo,{device.type}:{own}" if own else "gloo",  # gloo for what ranks agree on
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout_s),
        )
        _joined = True
    return make_mesh(device.type, **sizes)


def stop() -> None:
    """Undo `start`: leave the process group, unless it was there before; there is no mesh then."""
    global _mesh, _joined
    _mesh = None
    if _joined:
        _joined = False
        dist.destroy_process_group()


def make_mesh(
    device_type: str, *, dp_replicate: int = 1, dp_shard: int = -1, cp: int = 1, tp: int = 1
) -> DeviceMesh:
    """The run's mesh over all processes of the default process group; see `start`."""
    global _mesh
    sizes = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp}
    shape = _whole_sizes(sizes, dist.get_world_size())
    _mesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
    return _mesh


@contextmanager
def pretended(sizes: Mapping[str, int]) -> Iterator[DeviceMesh]:
    """Within it the run's mesh has these sizes and this process is its rank 0, all by itself.

    Programs on the device `meta` can be spread over it and looked at; nothing is exchanged.

    Args:
        sizes: of axes of the mesh; those that are not named have one rank.

    Raises:
        UserError: a size is not positive, or there are processes already.
    """
    global _mesh
    whole = dict.fromkeys(AXES, 1) | dict(sizes)
    ranks = math.prod(whole.values())
    _whole_sizes(whole, ranks)
    if dist.is_initialized():
        raise UserError("mesh: this process is one of several; a mesh is pretended in one alone")
    with pretended_processes(ranks):
        try:
            yield make_mesh("cpu", **whole)
        finally:
            _mesh = None


def _whole_sizes(sizes: Mapping[str, int], ranks: int) -> tuple[int, ...]:
    """The sizes of all axes; raises UserError if they do not make up the number of ranks."""
    given = dict(sizes)
    others = given["dp_replicate"] * given["cp"] * given["tp"]
    if given["dp_shard"] == -1:
        given["dp_shard"] = max(ranks // others, 1) if others > 0 else 1
    if others * given["dp_shard"] != ranks or min(given.values()) < 1:
        text = " * ".join(f"{axis}={size}" for axis, size in given.items())
        raise UserError(f"mesh: {text} must be the number of processes, {ranks}")
    return tuple(given[axis] for axis in AXES)


def _found() -> DeviceMesh | None:
    """The mesh, while there are the processes that it is of."""
    return _mesh if dist.is_initialized() else None


def is_spread() -> bool:
    """Whether the run has several processes and their mesh."""
    return _found() is not None


def sums_gradients() -> bool:
    """Whether there are ranks that see other tokens."""
    mesh = _found()
    return mesh is not None and bool(wide(mesh, DATA_AXES))


def data_rank() -> tuple[int, int]:
    """Which batches this process takes: the how manyth it is, of how many that take others.

    Ranks along `cp` and `tp` share a batch.
    """
    mesh = _found()
    if mesh is None:
        return 0, 1
    shards = mesh["dp_shard"].size()
    rank = mesh.get_local_rank("dp_replicate") * shards + mesh.get_local_rank("dp_shard")
    return rank, mesh["dp_replicate"].size() * shards


def current_mesh(key: str) -> DeviceMesh:
    """The run's mesh.

    Raises:
        UserError: there is none; the message names `key`, the option that needs it.
    """
    mesh = _found()
    if mesh is None:
        raise UserError(
            f"`{key}` needs several processes; start them with --nproc-per-node or torchrun"
        )
    return mesh


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
        offloaded: names of those that stay in the CPU's memory, whatever the mesh's device.
    """

    mesh: DeviceMesh
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    offloaded: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        """What this rank computes on."""
        return torch.device(self.mesh.device_type)

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

    def whole(self, name: str, local: Tensor) -> Tensor:
        """The whole of a tensor of the program; all ranks must call, and all get it.

        Args:
            name: of the parameter or buffer.
            local: it, or what an optimizer keeps for it, in its shape.
        """
        local = local.detach()
        for part in reversed(self.parts.get(name, ())):
            found = [torch.empty_like(local.contiguous()) for _ in range(part.ranks)]
            dist.all_gather(found, local.contiguous(), group=self.mesh.get_group(part.axis))
            parts = [dataclasses.replace(part, rank=rank) for rank in range(part.ranks)]
            local = part.join(
                [t.narrow(p.dim, 0, p.stop - p.start) for t, p in zip(found, parts, strict=True)]
            )
        return local

    def own(self, name: str, whole: Tensor) -> Tensor:
        """What this rank has of the whole of a tensor; the inverse of `whole`."""
        for part in self.parts.get(name, ()):
            whole = part.padded(part.of(whole))
        return whole

    def whole_shape(self, name: str, local: torch.Size) -> torch.Size:
        """The shape of `whole`."""
        shape = list(local)
        for part in self.parts.get(name, ()):
            shape[part.dim] = part.size
        return torch.Size(shape)

    def dtensor(self, name: str, local: Tensor) -> DTensor:
        """The whole of a tensor of the program as a view of this rank's part, without padding.

        Args:
            name: of the parameter or buffer.
            local: it, its gradient, or what an optimizer keeps for it, in its shape.
        """
        parts = {part.axis: part for part in self.parts.get(name, ())}
        shape = self.whole_shape(name, local.shape)
        for part in parts.values():
            local = local.narrow(part.dim, 0, part.stop - part.start)
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
            shape=shape,
            stride=stride,
        )


def sum_over(mesh: DeviceMesh, value: Tensor, axes: Iterable[str]) -> Tensor:
    """The sum of a tensor over all ranks along the axes; a new tensor."""
    value = value.detach().clone()
    for axis in wide(mesh, axes):
        dist.all_reduce(value, group=mesh.get_group(axis))
    return value
