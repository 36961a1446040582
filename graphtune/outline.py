"""A graph with each of its layers taken out, so that layers that are alike are compiled once.

A model of 30 layers is one layer 30 times, but a compiler that is given the whole graph compiles
each of them. `outline` makes a graph of calls of it: what is numbered in the module tree
(`model.layers.3`, `transformer.h.3`) becomes a call of a region, which takes the layer's
parameters as inputs, and layers of the same structure call the same region. What follows the last
layer, norm and head, is a region too; the few nodes before and between stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphtune.sites import layer_of
from graphtune.torch_private import size_symbol

aten = torch.ops.aten
END = "end"


@dataclass(frozen=True)
class Outline:
    """What `outline` makes of a graph.

    Attributes:
        graph_module: takes what the original takes. It calls `region_0`, `region_1`, ... of
            `regions`, and returns what `end` takes; `end(*graph_module(*inputs))[0]` is the
            original's output. It reads the original's parameters and buffers.
        regions: the distinct layers by name, in order of their first call, and `end`.
        calls: the layers that are called, each with the name of its region, in order.
    """

    graph_module: fx.GraphModule
    regions: dict[str, fx.GraphModule]
    calls: tuple[tuple[str, str], ...]


def outline(graph_module: fx.GraphModule) -> Outline:
    """Take the numbered layers, and what follows the last one, out of a graph.

    Two layers share a region if nothing that a compiler looks at tells them apart: operators,
    constants, shapes, dtypes, which values need a gradient, which of their tensors are one, and
    what passes say of recomputation. Tensors that a layer computes from parameters alone (a
    dequantized weight) are computed in the region, wherever they were in the graph, and sizes are
    read there from the region's inputs.

    Args:
        graph_module: a Program's; it is not changed.
    """
    return _Outliner(graph_module).outline


@dataclass
class _Run:
    """Nodes that follow each other, of one layer, or of none.

    What lies between two nodes of one layer is part of it.
    """

    layer: str | None
    nodes: list[fx.Node]


class _Outliner:
    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.root = graph_module
        self.floating = _floating(graph_module.graph)
        self.tensors = {
            node: _read(graph_module, node.target)
            for node in graph_module.graph.find_nodes(op="get_attr")
        }
        self.needs_grad = self._needs_grad()
        self.regions: dict[str, fx.GraphModule] = {}
        self.keys: dict[Hashable, str] = {}
        self.outer = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}  # original node -> that of the outer graph
        self.outline = self._build()

    def _build(self) -> Outline:
        result = self.root.graph.output_node().args[0]
        for node in self.root.graph.find_nodes(op="placeholder"):
            self.values[node] = self.outer.node_copy(node)
        runs = _runs(self.root.graph, self.floating)
        calls = []
        *body, end = runs if runs and runs[-1].layer is None else [*runs, _Run(None, [])]
        for run in body:
            if run.layer is None:
                for node in run.nodes:
                    self.values[node] = self.outer.node_copy(node, self._outer_value)
                continue
            outputs = [n for n in run.nodes if any(self._is_outside(u, run) for u in n.users)]
            calls.append((run.layer, self._call(run, outputs)))
        graph, sources = self._region(end.nodes, [result])
        self.regions[END] = fx.GraphModule(nn.Module(), graph)
        self.outer.output(tuple(map(self._outer_value, sources)))
        return Outline(self._outer_module(), self.regions, tuple(calls))

    def _is_outside(self, user: fx.Node, run: _Run) -> bool:
        """Whether what reads a node of a run is not of the run, or is what others copy."""
        if user in self.floating:  # a size, which whoever needs it reads for itself
            return any(self._is_outside(reader, run) for reader in user.users)
        return user not in run.nodes

    def _call(self, run: _Run, outputs: list[fx.Node]) -> str:
        """Call the region of a layer in the outer graph; returns its name."""
        graph, sources = self._region(run.nodes, outputs)
        name = self.keys.setdefault(self._key(graph, sources), f"region_{len(self.keys)}")
        if name not in self.regions:
            self.regions[name] = fx.GraphModule(nn.Module(), graph)
        results = self.outer.call_module(name, tuple(map(self._outer_value, sources)))
        for index, node in enumerate(outputs):
            value = self.outer.call_function(operator.getitem, (results, index))
            value.meta = dict(node.meta)
            self.values[node] = value
        return name

    def _outer_value(self, node: fx.Node) -> fx.Node:
        """The node of the outer graph for one of the original graph."""
        if node not in self.values:  # a parameter, or what floats
            self.values[node] = self.outer.node_copy(node, self._outer_value)
        return self.values[node]

    def _outer_module(self) -> fx.GraphModule:
        # As in a Program: one set of tensors under two modules.
        root = nn.Module()
        root._modules = {**self.root._modules, **self.regions}
        root._parameters, root._buffers = self.root._parameters, self.root._buffers
        module = fx.GraphModule(root, self.outer, class_name="Outline")
        module._modules, module._parameters = root._modules, root._parameters
        module._buffers = root._buffers
        return module

    def _region(
        self, nodes: list[fx.Node], outputs: list[fx.Node]
    ) -> tuple[fx.Graph, list[fx.Node]]:
        """A graph of some nodes, and the original nodes that are its inputs, in order."""
        inside = set(nodes)
        reads = [source for node in nodes for source in node.all_input_nodes] + outputs
        given = dict.fromkeys(n for n in reads if n not in inside and n not in self.floating)
        region = _Region(self, given)
        for node in nodes:
            region.values[node] = region.graph.node_copy(node, region.value)
        region.graph.output(tuple(map(region.value, outputs)))
        return region.graph, list(region.sources)

    def _key(self, graph: fx.Graph, sources: list[fx.Node]) -> Hashable:
        """Equal for regions that a compiler cannot tell apart."""
        index = {node: f"%{number}" for number, node in enumerate(graph.nodes)}
        numbers = sorted({node.meta.get("ac_graph_id", 0) for node in graph.nodes})
        tensors = [self.tensors.get(source) for source in sources]
        inputs = [
            (_signature(t) if t is not None else _shape(s.meta["val"]), self.needs_grad[s])
            for s, t in zip(sources, tensors, strict=True)
        ]
        nodes = [
            (
                node.target if node.op == "call_function" else node.op,
                str(fx.node.map_arg((node.args, node.kwargs), lambda n: _Name(index[n]))),
                _shape(node.meta.get("val")),
                node.meta.get("recompute"),
                numbers.index(node.meta.get("ac_graph_id", 0)),
                node.meta.get("custom", {}).get("memory_budget"),
            )
            for node in graph.nodes
        ]
        return tuple(inputs), tuple(nodes)

    def _needs_grad(self) -> dict[fx.Node, bool]:
        """Which nodes autograd follows; a layer of frozen weights on a frozen input it does not."""
        found: dict[fx.Node, bool] = {}
        for node in self.root.graph.nodes:
            if node.op == "get_attr":
                found[node] = getattr(self.tensors[node], "requires_grad", False)
            else:
                found[node] = (
                    any(found[source] for source in node.all_input_nodes)
                    and node.target not in (aten.detach.default, aten.detach_.default)
                    and any(t.is_floating_point() for t in _tensors(node.meta.get("val")))
                )
        return found


class _Region:
    """A region's graph while nodes are copied into it."""

    def __init__(self, outliner: _Outliner, given: dict[fx.Node, None]) -> None:
        self.outliner = outliner
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.sources: dict[fx.Node, fx.Node] = {}  # original node -> placeholder
        self.by_tensor: dict[int, fx.Node] = {}
        self.sizes: dict[str, tuple[fx.Node, int]] = {}
        for node in given:
            self._input(node)
        for source, placeholder in self.sources.items():
            if source.op != "get_attr" and isinstance(value := source.meta["val"], Tensor):
                for dim, size in enumerate(value.shape):
                    if (symbol := size_symbol(size)) is not None:
                        self.sizes.setdefault(symbol, (placeholder, dim))

    def _input(self, node: fx.Node) -> fx.Node:
        """The placeholder for a value from outside; one for each tensor, whatever its names."""
        tensor = self.outliner.tensors.get(node)
        if isinstance(tensor, Tensor) and id(tensor) in self.by_tensor:
            self.values[node] = self.by_tensor[id(tensor)]
            return self.values[node]
        last = next(reversed(self.sources.values()), None)
        first = next(iter(self.graph.nodes), None)
        place = self.graph.inserting_after(last) if last else self.graph.inserting_before(first)
        with place:
            placeholder = self.graph.placeholder(f"input_{len(self.sources)}")
        placeholder.meta = {key: node.meta[key] for key in ("val",) if key in node.meta}
        self.values[node] = self.sources[node] = placeholder
        if isinstance(tensor, Tensor):
            self.by_tensor[id(tensor)] = placeholder
        return placeholder

    def value(self, node: fx.Node) -> fx.Node:
        """The region's node for one of the original graph."""
        if node not in self.values:
            if node not in self.outliner.floating:
                return self._input(node)
            known = self.sizes.get(str(size_symbol(node.meta["val"])))
            if known is not None:
                self.values[node] = self.graph.call_function(aten.sym_size.int, known)
                self.values[node].meta = {"val": node.meta["val"]}
            else:
                self.values[node] = self.graph.node_copy(node, self.value)
        return self.values[node]


class _Name(str):
    """Stands for a node among arguments; shown without quotes, as no string is."""

    __repr__ = str.__str__


def _runs(graph: fx.Graph, floating: set[fx.Node]) -> list[_Run]:
    nodes = [n for n in graph.nodes if n.op == "call_function" and n not in floating]
    layers = [layer_of(node) for node in nodes]
    ends = {layer: index for index, layer in enumerate(layers)}
    runs: list[_Run] = []
    for index, (node, layer) in enumerate(zip(nodes, layers, strict=True)):
        current = runs[-1].layer if runs else None
        if layer is None and current is not None and index < ends[current]:
            layer = current
        if not runs or layer != current:
            runs.append(_Run(layer, []))
        runs[-1].nodes.append(node)
    return runs


def _floating(graph: fx.Graph) -> set[fx.Node]:
    """Calls that belong where they are needed: of sizes, and of parameters alone."""
    attributes = set(graph.find_nodes(op="get_attr"))
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        sources = node.all_input_nodes
        constant = bool(sources) and all(s in attributes or s in found for s in sources)
        is_number = isinstance(node.meta["val"], int | float | torch.SymInt | torch.SymFloat)
        if is_number or (constant and not any(_is_number(s) for s in sources)):
            found.add(node)
    return found


def _is_number(node: fx.Node) -> bool:
    return not any(True for _ in _tensors(node.meta["val"]))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)


def _shape(value: Any) -> str:
    """Shapes and dtypes of a traced value."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{[str(size) for size in value.shape]}{value.device}"
    if isinstance(value, tuple | list):
        return str([_shape(one) for one in value])
    return str(value)


def _signature(value: Any) -> str:
    """What a compiler sees of a parameter or a buffer; of the training flag, that it is one."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{type(value).__name__}{_shape(value)}{value.stride()}"


def _read(root: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(root.get_submodule(owner), leaf)
