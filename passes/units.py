"""What passes that spread a program over processes share: units, and replicated parameters.

A unit is what communicates at once: a numbered layer, or what comes before, between or after
those.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from operator import getitem
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh

from graphtune.collectives import sum_gradients
from graphtune.distributed import group_name, wide
from graphtune.errors import UserError
from graphtune.recomputation import constants
from graphtune.rewrite import Edit
from graphtune.sites import layer_of

DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_option(key: str, name: str | None) -> torch.dtype | None:
    """The dtype that an option names.

    Raises:
        UserError: there is none of that name.
    """
    if name is not None and name not in DTYPES:
        raise UserError(f"`{key}={name}` must be one of {', '.join(DTYPES)}, or null")
    return None if name is None else DTYPES[name]


def describe(mesh: DeviceMesh) -> dict[str, int]:
    """Sizes of a mesh's axes by name: what the ledger and the plan's hash know of it."""
    return dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))


class Unit:
    """A unit of a graph, with the reads of tensors in it.

    Attributes:
        name: of the layer, or where it lies.
        reads: by the name of a tensor, the nodes of the unit that read it and the reads.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.reads: dict[str, list[tuple[fx.Node, fx.Node]]] = {}

    @contextmanager
    def before_it(self, edit: Edit) -> Iterator[None]:
        """What is inserted within comes before all nodes of the unit that read."""
        (first, _), *_ = next(iter(self.reads.values()))
        with edit.after(first.prev, origin=first):
            yield

    def region(self) -> int:
        """The region in which its readers are computed again (see `graphtune.recomputation`)."""
        readers = (user for reads in self.reads.values() for user, _ in reads)
        return max(user.meta.get("ac_graph_id", 1) for user in readers)

    def give(self, name: str, new: fx.Node) -> None:
        """Let the unit read `new` instead of the tensor `name`."""
        for user, read in self.reads[name]:
            user.replace_input_with(read, new)


def units(graph: fx.Graph, names: Collection[str]) -> list[Unit]:
    """The units that read any of the tensors `names`, in the graph's order."""
    found: dict[str, Unit] = {}
    last = ""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        layer = layer_of(node)
        last = layer or last
        name = layer or (f"after {last}" if last else "first")
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source.target in names:
                unit = found.setdefault(name, Unit(name))
                unit.reads.setdefault(source.target, []).append((node, source))
    return list(found.values())


def sink_constants(graph: fx.Graph) -> None:
    """Move what is computed from weights alone to its first use: so far it may all come first."""
    fixed = constants(graph)
    for node in reversed(list(graph.nodes)):
        if node in fixed and node.op == "call_function" and node.users:
            min(node.users).prepend(node)  # nodes are ordered as in the graph


def replicate(edit: Edit, names: Collection[str], mesh: DeviceMesh, axes: Iterable[str]) -> None:
    """Start parameters alike on all ranks along the axes: they become those of the first rank."""
    groups = [mesh.get_group(axis) for axis in wide(mesh, axes)]

    def first(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        for group in () if tensor.is_meta else groups:
            dist.broadcast(tensor, group=group, group_src=0)
        return tensor

    done: set[int] = set()
    for name in names:
        if id(edit.parameters[name]) not in done:
            edit.replace(name, first)
            done.add(id(edit.parameters[name]))


def sum_replicated(
    edit: Edit,
    names: Collection[str],
    mesh: DeviceMesh,
    axes: Iterable[str],
    reduce_dtype: torch.dtype | None,
) -> None:
    """Sum the gradients of parameters that every rank has whole: one all-reduce for each unit.

    A parameter that is read in several units belongs to the first one, where all its gradients
    have come together.
    """
    groups = [group_name(mesh, axis) for axis in wide(mesh, axes)]
    if not groups:
        return
    seen: set[int] = set()
    for unit in units(edit.graph, names):
        new = {name: edit.parameters[name] for name in unit.reads}
        own = {id(p): name for name, p in new.items() if id(p) not in seen}
        seen.update(own)
        if not own:
            continue
        users = {name: _users(edit, parameter) for parameter, name in own.items()}
        with unit.before_it(edit):
            shared = [edit.read(name) for name in own.values()]
            summed = edit.call(sum_gradients, shared, reduce_dtype, groups)
            for index, name in enumerate(own.values()):
                one = edit.call(getitem, summed, index)
                for user, read in users[name]:
                    user.replace_input_with(read, one)


def _users(edit: Edit, parameter: int) -> list[tuple[fx.Node, fx.Node]]:
    """The nodes that read a parameter under any of its names, and the reads."""
    names = [name for name, one in edit.parameters.items() if id(one) == parameter]
    reads = [read for name in names for read in edit.graph.find_nodes(op="get_attr", target=name)]
    return [(user, read) for read in reads for user in read.users]
