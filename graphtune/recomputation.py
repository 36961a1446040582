"""What a step does about the tensors that its backward pass needs: keep, compute again, move away.

A pass writes it into the graph as tags (see `tag`), and this module carries them out. Of a
compiled step the min-cut partitioner of AOTAutograd reads the tags itself; what it cannot read, a
budget and a move to the CPU, `as_tagged` sets around it. Without a compiler `by_region` runs the
graph under `torch.utils.checkpoint`. In both ways a region that is computed again draws the same
random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from graphtune.program import Program
from graphtune.torch_private import memory_budget

aten = torch.ops.aten
RECOMPUTE = CheckpointPolicy.MUST_RECOMPUTE
SAVE = CheckpointPolicy.MUST_SAVE
FREE = CheckpointPolicy.PREFER_SAVE  # the partitioner chooses
OFFLOAD = CheckpointPolicy.MUST_CPU_OFFLOAD

_FIRST = 2  # `rewrite.must_recompute` gives 1 to what belongs to no region


def tag(node: fx.Node, policy: CheckpointPolicy, region: int, budget: float | None = None) -> None:
    """Say what is to become of a node's result, if the backward pass needs it.

    Args:
        policy: one of the constants above.
        region: number of the nodes that are computed again together, a layer; they count up in
            the order in which the regions run.
        budget: for FREE, the share that may be kept of what would be by itself.
    """
    node.meta["recompute"] = policy
    node.meta["ac_graph_id"] = region + _FIRST
    if budget is not None:  # a new mapping: copies of a graph share theirs
        node.meta["custom"] = {**node.meta.get("custom", {}), "memory_budget": budget}


def carry_tags(node: fx.Node, replaced: fx.Node) -> fx.Node:
    """Let a node that a pass puts in the place of another be treated as that one was."""
    for key in ("recompute", "ac_graph_id"):
        if key in replaced.meta:
            node.meta[key] = replaced.meta[key]
    if (budget := replaced.meta.get("custom", {}).get("memory_budget")) is not None:
        node.meta["custom"] = {**node.meta.get("custom", {}), "memory_budget": budget}
    return node


def _region(node: fx.Node) -> int | None:
    number = node.meta.get("ac_graph_id", 0) - _FIRST
    return number if number >= 0 else None


def _budget(graph: fx.Graph) -> float | None:
    found = (node.meta.get("custom", {}).get("memory_budget") for node in graph.nodes)
    return next((budget for budget in found if budget is not None), None)


def _offloads(graph: fx.Graph) -> bool:
    return any(node.meta.get("recompute") == OFFLOAD for node in graph.nodes)


@contextmanager
def as_tagged(program: Program) -> Iterator[None]:
    """Call a compiled forward of the program within it, from the first call on.

    It sets the budget while the forward is compiled, and moves to the CPU what is tagged so.
    """
    with ExitStack() as stack:
        if (budget := _budget(program.graph)) is not None:
            stack.enter_context(memory_budget(budget))
        if _offloads(program.graph):
            stack.enter_context(offloaded((*program.parameters(), *program.buffers())))
        yield


@contextmanager
def offloaded(kept: Iterable[Tensor]) -> Iterator[None]:
    """Within it, what autograd saves on an accelerator waits in pinned memory of the CPU.

    Args:
        kept: tensors that stay where they are, such as parameters.
    """
    storages = {tensor.untyped_storage()._cdata for tensor in kept}

    def pack(tensor: Tensor) -> Any:
        if tensor.device.type == "cpu" or tensor.untyped_storage()._cdata in storages:
            return tensor
        away = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return tensor.device, away.copy_(tensor, non_blocking=True)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, away = packed
        return away.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def by_region(program: Program) -> Program:
    """The program to call where nothing is compiled: it does by itself what the tags ask for.

    It has the same tensors, and follows `program.train()` and `.eval()`. There is no partitioner
    to hold to a budget; below 1 whole regions are computed again, which keeps less, and takes
    longer, than the budget allows.
    """
    runner = _Runner(program.graph_module)
    if not runner.is_needed:
        return program
    other = copy.copy(program)
    object.__setattr__(other, "graph_module", runner)
    for name in ("unmasked", "packed"):
        if (graph_module := getattr(program, name)) is not None:
            object.__setattr__(other, name, _Runner(graph_module))
    return other


class _Step:
    """Nodes that run one after the other, perhaps a region that is computed again.

    Attributes:
        again: whether the backward pass computes them again.
        attributes: parameters and buffers that go in.
        inputs: other nodes whose values go in.
        nodes: what runs; constants, such as dequantized weights, only where they are needed.
        outputs: those whose values others read.
        selective: whether the results of some nodes inside are saved.
    """

    def __init__(self, nodes: list[fx.Node], again: bool, constants: set[fx.Node]) -> None:
        self.again = again
        sources = list(dict.fromkeys(s for node in nodes for s in _sources(node, constants)))
        self.attributes = [source for source in sources if source.op == "get_attr"]
        ordered = dict.fromkeys(s for n in nodes for s in (*_sources(n, constants), n))
        own = set(nodes) | constants
        self.nodes = [node for node in ordered if node in own and node.op != "get_attr"]
        inside = {*self.attributes, *self.nodes}
        self.inputs = [source for source in sources if source not in inside]
        self.outputs = [node for node in nodes if node.users.keys() - inside]
        kept = {node for node in nodes if node.meta.get("recompute") == SAVE}
        self.selective = bool(kept - set(self.outputs))
        last = {source: node for node in self.nodes for source in node.all_input_nodes}
        self._done: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.nodes}
        for source, node in last.items():
            if source not in self.outputs:
                self._done[node].append(source)

    def run(self, attributes: list[Any], where: list[fx.Node], *inputs: Any) -> tuple[Any, ...]:
        """The outputs. `where` is told which node is running."""
        values = dict(zip([*self.attributes, *self.inputs], [*attributes, *inputs], strict=True))
        for node in self.nodes:
            where[:] = [node]
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
            del args, kwargs
            for source in self._done[node]:
                del values[source]
        return tuple(values[node] for node in self.outputs)


def _sources(node: fx.Node, constants: set[fx.Node]) -> Iterator[fx.Node]:
    """What a node reads, each constant among it after what that is computed from."""
    for source in node.all_input_nodes:
        if source in constants:
            yield from _sources(source, constants)
        yield source


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that do not depend on the input, such as stored and dequantized weights."""
    found = set(graph.find_nodes(op="get_attr"))
    for node in graph.nodes:
        sources = node.all_input_nodes if node.op == "call_function" else []
        if sources and found.issuperset(sources):
            found.add(node)
    return found


class _Runner(nn.Module):
    """Runs a graph node by node, its regions under `torch.utils.checkpoint`."""

    graph_module: fx.GraphModule

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        object.__setattr__(self, "graph_module", graph_module)
        self._parameters = graph_module._parameters
        self._buffers = graph_module._buffers
        self._modules = graph_module._modules
        self.graph = graph_module.graph
        self.steps = self._steps(self.graph)
        self.offloads = _offloads(self.graph)
        self.is_needed = self.offloads or any(step.again for step in self.steps)

    def _steps(self, graph: fx.Graph) -> list[_Step]:
        """Regions are runs of nodes; what lies between two nodes of one is part of it."""
        fixed, budget = constants(graph), _budget(graph)
        calls = [n for n in graph.nodes if n.op == "call_function" and n not in fixed]
        ends = {_region(node): index for index, node in enumerate(calls)}
        runs: list[list[fx.Node]] = []
        current: int | None = None
        for index, node in enumerate(calls):
            region = _region(node)
            if region is None and current is not None and index < ends[current]:
                region = current
            if not runs or region != current:
                runs.append([])
                current = region
            runs[-1].append(node)
        again = {RECOMPUTE, FREE} if budget is not None and budget < 1 else {RECOMPUTE}
        return [
            _Step(run, any(n.meta.get("recompute") in again for n in run), fixed) for run in runs
        ]

    def forward(self, *inputs: Tensor) -> Any:
        values: dict[fx.Node, Any] = dict(
            zip(self.graph.find_nodes(op="placeholder"), inputs, strict=True)
        )
        with ExitStack() as stack:
            if self.offloads:
                stack.enter_context(offloaded((*self.parameters(), *self.buffers())))
            for step in self.steps:
                # Read now: by the time of the backward pass they may be others.
                attributes = [self._read(str(node.target)) for node in step.attributes]
                given = [values[node] for node in step.inputs]
                results = self._run(step, attributes, given)
                values.update(zip(step.outputs, results, strict=True))
        return values[self.graph.output_node().args[0]]

    def _read(self, name: str) -> Any:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.graph_module.get_submodule(owner), leaf)

    @staticmethod
    def _run(step: _Step, attributes: list[Any], inputs: list[Any]) -> tuple[Any, ...]:
        where: list[fx.Node] = []
        run = partial(step.run, attributes, where)
        if not step.again or not torch.is_grad_enabled():
            return run(*inputs)
        options: dict[str, Any] = {}
        if step.selective:
            options["context_fn"] = partial(
                create_selective_checkpoint_contexts, partial(_policy, where)
            )
        return checkpoint(run, *inputs, use_reentrant=False, **options)


def _policy(where: list[fx.Node], context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    """What to do with the result of an operator that a node is made of."""
    (node,) = where
    if node.meta.get("recompute") != SAVE or op.is_view or not _is_result(node, op):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return SAVE


def _is_result(node: fx.Node, op: Any) -> bool:
    """Of attention keep what it returns, not the mask that it makes of a boolean one."""
    is_attention = node.target is aten.scaled_dot_product_attention.default
    return not is_attention or "scaled_dot_product" in str(op)
