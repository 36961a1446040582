"""FSDP: every rank keeps a shard of each weight, and gathers a layer's weights to use them.

Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models
(arXiv:1910.02054); Zhao et al., PyTorch FSDP (arXiv:2304.11277).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh

from graphtune.collectives import unshard
from graphtune.distributed import (
    DATA_AXES,
    Distribution,
    Part,
    current_mesh,
    group_name,
    size,
    wide,
)
from graphtune.errors import UserError
from graphtune.normalize import follow_input_device
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.passes.units import (
    DtypeName,
    Unit,
    describe,
    dtype_option,
    replicate,
    sink_constants,
    sum_replicated,
    units,
)
from graphtune.recomputation import RECOMPUTE, SAVE
from graphtune.rewrite import Edit
from graphtune.rules import Named, match
from graphtune.sites import Site

aten = torch.ops.aten
KEY = "passes.fsdp"
_SMALL = 1024  # elements; a buffer of fewer is not worth its place in a collective


@dataclass(frozen=True)
class FSDP(Pass):
    """Divides parameters and quantized weights over the axis `dp_shard` of the mesh.

    Each rank has as many rows of the first dimension (of the largest one, where the first is
    shorter than the axis). In the graph the shards of a layer are gathered by one collective
    before its first use, and in the backward pass their gradients summed and scattered by one;
    what does not train is gathered by another, as stored (quantized weights in their few bits),
    and has no gradient to exchange. A tied weight is one shard, and gathered for each use.

    A loss is to be divided by the number of tokens of all ranks, as `TrainStep` does; gradients
    are summed over ranks, and are then those of one process with the whole batch. Over the mesh's
    other axes along which tokens differ (`dp_replicate`: HSDP; `cp`) shards are replicated, and
    their gradients summed by an all-reduce.

    The parameters of the program are plain tensors, this rank's shards, so that optimizers work on
    them as on any; `program.distribution.dtensor(name, tensor)` is the DTensor for checkpoints.

    Attributes:
        mesh: the run's mesh; None: that of `graphtune.distributed.make_mesh`.
        reshard_after_forward: gather a layer again in the backward pass, instead of keeping it.
        replicate: patterns of parameters (`*lora_*`) that stay whole on every rank.
        shard_dtype: of shards that train, and so of their optimizer's state; None: the weight's.
        param_dtype: in which parameters that train are gathered; None: the weight's.
        reduce_dtype: in which their gradients are summed; None: as gathered.
        offload: keep shards, their gradients and so the optimizer's state in the CPU's memory. A
            layer's shards are copied to the device to be gathered, their gradients copied back,
            and the optimizer steps on the CPU.
    """

    mesh: DeviceMesh | None = None
    reshard_after_forward: bool = True
    replicate: tuple[str, ...] = ()
    shard_dtype: DtypeName | None = None
    param_dtype: DtypeName | None = None
    reduce_dtype: DtypeName | None = None
    offload: bool = False

    name: ClassVar[str] = "fsdp"
    stage: ClassVar[Stage] = Stage.DISTRIBUTE
    order: ClassVar[int] = 1  # after what divides matrices
    conflicts: ClassVar[frozenset[str]] = frozenset({"data_parallel", "fsdp"})

    def __post_init__(self) -> None:
        given = self.replicate
        object.__setattr__(self, "replicate", (given,) if isinstance(given, str) else tuple(given))
        for name in ("shard_dtype", "param_dtype", "reduce_dtype"):
            dtype_option(f"{KEY}.{name}", getattr(self, name))

    @property
    def numerics(self) -> Numerics:
        return "exact" if self.param_dtype is None else "lossy"

    @property
    def badge(self) -> str:
        kept = "" if self.reshard_after_forward else " kept"
        return f"fsdp{kept}{' offloaded' if self.offload else ''}"

    def options(self) -> dict[str, object]:
        """The mesh as the sizes of its axes."""
        return {**super().options(), "mesh": describe(self._mesh())}

    def _mesh(self) -> DeviceMesh:
        return self.mesh or current_mesh(KEY)

    def _dtype(self, option: str) -> torch.dtype | None:
        return dtype_option(f"{KEY}.{option}", getattr(self, option))

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        mesh = self._mesh()
        if not wide(mesh, ["dp_shard"]):
            raise UserError(f"`{KEY}` has one rank to shard over, dp_shard=1; take data_parallel")
        whole_dtypes = {name: tensor.dtype for name, tensor in edit.parameters.items()}
        sink_constants(edit.graph)
        parts = self._shard(edit, mesh)
        for unit in units(edit.graph, parts):
            self._gather(edit, unit, mesh, parts, whole_dtypes)
        rest = [n for n, p in edit.parameters.items() if p.requires_grad and n not in parts]
        replicate(edit, rest, mesh, DATA_AXES)
        sum_replicated(edit, rest, mesh, DATA_AXES, self._dtype("reduce_dtype"))
        before = edit.distribution.parts if edit.distribution else {}
        added = {name: (*before.get(name, ()), part) for name, part in parts.items()}
        edit.distribution = Distribution(
            mesh, {**before, **added}, frozenset(parts if self.offload else ())
        )
        if self.offload:
            follow_input_device(edit.graph)
        return edit.sites("linear", "embedding", "experts")

    def _shard(self, edit: Edit, mesh: DeviceMesh) -> dict[str, Part]:
        """Let this rank's shards take the place of what is to be sharded; the part of each."""
        kept: Iterable[str] = ()
        if self.replicate:
            named = list(map(Named, edit.parameters))
            kept = match(named, self.replicate, key=f"{KEY}.replicate").keys()
        before = edit.distribution.parts if edit.distribution else {}
        parts: dict[str, Part] = {}
        for name in (*edit.parameters, *_quantized(edit.graph)):
            if name in kept or name in parts:
                continue
            tensor = edit.tensor(name)
            taken = {one.dim for one in before.get(name, ())}
            part = _divide(tensor, mesh, taken, _SMALL if name in edit.buffers else 1)
            if part is not None:
                dtype = self._dtype("shard_dtype") if tensor.requires_grad else None
                names = edit.replace(name, _taker(part, dtype), part=part)
                parts |= dict.fromkeys(names, part)
        return parts

    def _gather(
        self,
        edit: Edit,
        unit: Unit,
        mesh: DeviceMesh,
        parts: dict[str, Part],
        whole_dtypes: dict[str, torch.dtype],
    ) -> None:
        """Gather what a unit reads: one collective for what trains (of each dtype), one for what
        does not."""
        groups: dict[torch.dtype | None, list[str]] = {}
        for name in unit.reads:
            key = whole_dtypes[name] if edit.tensor(name).requires_grad else None
            groups.setdefault(key, []).append(name)
        replicas = [group_name(mesh, axis) for axis in wide(mesh, DATA_AXES) if axis != "dp_shard"]
        with unit.before_it(edit):
            for dtype, names in groups.items():
                gathered = edit.call(
                    unshard,
                    [self._read(edit, name, unit) for name in names],
                    [parts[name].dim for name in names],
                    [parts[name].size for name in names],
                    dtype and (self._dtype("param_dtype") or dtype),
                    dtype,
                    self._dtype("reduce_dtype"),
                    size(mesh, "dp_shard"),
                    group_name(mesh, "dp_shard"),
                    replicas if dtype else [],
                    unit.name if self.reshard_after_forward else "",
                )
                self._tag(gathered, unit)
                for index, name in enumerate(names):
                    whole = edit.call(getitem, gathered, index)
                    self._tag(whole, unit)
                    unit.give(name, whole)

    def _read(self, edit: Edit, name: str, unit: Unit) -> fx.Node:
        read = edit.read(name)
        if not self.offload:
            return read
        value = read.meta["val"]
        # From pinned memory the copy does not wait.
        copy = edit.call(aten.to.device, read, value.device, value.dtype, True)
        self._tag(copy, unit)
        return copy

    def _tag(self, node: fx.Node, unit: Unit) -> None:
        # The region of what reads it, or it would be saved on its way there.
        node.meta["recompute"] = RECOMPUTE if self.reshard_after_forward else SAVE
        node.meta["ac_graph_id"] = unit.region()


def _quantized(graph: fx.Graph) -> list[str]:
    """The buffers that quantized weights are kept in."""
    reads = graph.find_nodes(op="get_attr")
    return list(dict.fromkeys(n.target for n in reads if "format" in n.meta.get("custom", {})))


def _divide(tensor: Tensor, mesh: DeviceMesh, taken: Iterable[int], smallest: int) -> Part | None:
    """How a tensor is divided over `dp_shard`; None: not at all.

    Args:
        taken: dimensions that are divided already.
        smallest: number of elements of which a tensor is divided.
    """
    ranks, rank = size(mesh, "dp_shard"), mesh.get_local_rank("dp_shard")
    free = [dim for dim in range(tensor.dim()) if dim not in set(taken)]
    if not free or tensor.numel() < smallest:
        return None
    long = [dim for dim in free if tensor.shape[dim] >= ranks]
    if not long:
        return None
    dim = long[0] if long[0] == free[0] else max(long, key=lambda one: tensor.shape[one])
    return Part(dim, tensor.shape[dim], ranks, rank, "dp_shard")


def _taker(part: Part, dtype: torch.dtype | None) -> Any:
    def take(whole: Tensor) -> Tensor:
        mine = part.padded(part.of(whole.detach()))
        return mine if dtype is None else mine.to(dtype)

    return take
