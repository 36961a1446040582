"""The edit primitives that passes use. They keep shapes, origin and authorship of each node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from graphtune.distributed import Part
from graphtune.program import Deferred, Fill, LedgerRow, Program
from graphtune.shapes import of_call, of_read
from graphtune.sites import Kind, Site, find_sites


def insert_call(
    graph: fx.Graph, target: Callable, *args: Any, origin: fx.Node, by: str, **kwargs: Any
) -> fx.Node:
    """Insert `target(*args, **kwargs)` at the graph's insertion point.

    Args:
        origin: the node whose module and source line the new node belongs to.
        by: the pass that writes it.

    Returns:
        The node, with its (symbolic) shape and dtype in `meta["val"]`.
    """
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = of_call(node)
    _set_origin(node, origin, by)
    return node


def _set_origin(node: fx.Node, origin: fx.Node, by: str) -> None:
    for key in ("nn_module_stack", "stack_trace"):
        if key in origin.meta:
            node.meta[key] = origin.meta[key]
    node.meta["custom"] = {"graphtune": by}


def written_by(node: fx.Node) -> str | None:
    """The pass that wrote a node; None for what capture found."""
    return node.meta.get("custom", {}).get("graphtune")


def must_recompute(node: fx.Node) -> None:
    """Keep what a node computes out of what is saved for the backward pass.

    The tag is read by the min-cut partitioner of `torch.compile`.
    """
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    node.meta["ac_graph_id"] = 1


def constants_of(node: fx.Node) -> tuple[str, ...] | None:
    """Names of the tensors that a node is computed from; None if it depends on the input."""
    names: dict[str, None] = {}
    seen, stack = {node}, [node]
    while stack:
        source = stack.pop()
        if source.op == "get_attr":
            names[source.target] = None
        elif source.op != "call_function" or not source.all_input_nodes:
            return None
        for one in reversed(source.all_input_nodes):
            if one not in seen:
                seen.add(one)
                stack.append(one)
    return tuple(names)


def evaluate(node: fx.Node, tensors: Mapping[str, Tensor]) -> Tensor:
    """The value of a node that is computed from constants alone, such as a stored weight."""
    if node.op == "get_attr":
        return tensors[node.target]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: evaluate(n, tensors))
    return node.target(*args, **kwargs)


class Edit:
    """A program being rewritten by one pass.

    The graph is a copy; the tensors are those of the program until the pass replaces them.

    Attributes:
        graph: the copy to edit. Raw `torch.fx` is fine; the verifier reads what came out.
        parameters: by name; the methods below add, replace and remove entries.
        buffers: by name, with whether `state_dict` holds them.
        info: the program's, for a pass that changes what it says.
        distribution: likewise.
        figures: what the pass measures, by name; they go to the ledger.
    """

    def __init__(self, program: Program, by: str) -> None:
        self.program = program
        self.by = by
        self.graph = fx.Graph()
        result = self.graph.graph_copy(program.graph, {})
        self.graph.output(result).meta = dict(program.graph.output_node().meta)
        self.parameters = program.all_parameters()
        self.buffers = program.all_buffers()
        self.info = program.info
        self.distribution = program.distribution
        self.figures: dict[str, float] = {}
        self.pasted: list[fx.Node] = []
        self._fills: list[Fill] = []
        self._origin: fx.Node | None = None
        self._notes: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where the program's parameters are; `meta` while its weights are not loaded."""
        return next(iter(self.parameters.values())).device

    def sites(self, *kinds: Kind) -> list[Site]:
        """The places of these kinds, in the order of the graph (see `graphtune.sites`)."""
        return [site for site in find_sites(self.graph) if site.kind in kinds]

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of that name."""
        return self.parameters[name] if name in self.parameters else self.buffers[name][0]

    @contextmanager
    def after(
        self, node: fx.Node, *, origin: fx.Node | None = None, **notes: Any
    ) -> Iterator[None]:
        """What `call` and `read` insert inside goes after `node` and belongs to its module.

        Args:
            origin: a node whose module it belongs to instead; a read of a weight has none.
            notes: written to `meta["custom"]` of what is inserted, for later passes to read.
        """
        self._origin, self._notes = origin or node, notes
        with self.graph.inserting_before(node.next):
            yield

    def call(self, target: Callable, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call of an operator at the place that `after` set."""
        assert self._origin is not None, "call() belongs inside `with edit.after(node):`"
        node = insert_call(self.graph, target, *args, origin=self._origin, by=self.by, **kwargs)
        node.meta["custom"].update(self._notes)
        return node

    def paste(self, body: fx.Graph, inputs: Iterable[fx.Node]) -> list[fx.Node]:
        """Insert a copy of a graph that returns a tuple, at the place that `after` set.

        Args:
            body: its nodes carry shapes of the program's own symbols.
            inputs: what its placeholders are.

        Returns:
            What it returns; `pasted` are all its nodes.
        """
        assert self._origin is not None, "paste() belongs inside `with edit.after(node):`"
        values = dict(zip(body.find_nodes(op="placeholder"), inputs, strict=True))
        given = set(values)
        results = self.graph.graph_copy(body, values)
        self.pasted = [copy for node, copy in values.items() if node not in given]
        for node in self.pasted:
            node.meta = {"val": node.meta["val"]}
            _set_origin(node, self._origin, self.by)
        return list(results)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Insert a cast where the node has another dtype."""
        same = node.meta["val"].dtype == dtype
        return node if same else self.call(torch.ops.aten.to.dtype, node, dtype)

    def read(self, name: str) -> fx.Node:
        """Insert a read of the parameter or buffer `name` at the place that `after` set."""
        assert self._origin is not None, "read() belongs inside `with edit.after(node):`"
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = of_read(self.graph, self.tensor(name))
        _set_origin(node, self._origin, self.by)
        node.meta["custom"].update(self._notes)
        return node

    def read_training(self) -> fx.Node:
        """Insert a read of the flag that `.train()` and `.eval()` set."""
        assert self._origin is not None, "read_training() belongs inside `with edit.after(node):`"
        node = self.graph.create_node("get_attr", "training")
        node.meta["val"] = True
        _set_origin(node, self._origin, self.by)
        return node

    def add_parameter(self, name: str, value: Tensor, *, trainable: bool = True) -> None:
        """Add a parameter; its name must be new.

        Raises:
            ValueError: the program has a parameter of that name.
        """
        if name in self.parameters:
            raise ValueError(f"{self.by}: the program has a parameter {name!r} already")
        self.parameters[name] = nn.Parameter(value, requires_grad=trainable)

    def add_buffer(self, name: str, value: Tensor, *, persistent: bool = True) -> None:
        """Add or replace a buffer, with whether `state_dict` is to hold it."""
        self.buffers[name] = (value, persistent)

    def remove(self, name: str) -> Tensor:
        """Take a parameter or a buffer out of the program; returns it."""
        return self.parameters.pop(name) if name in self.parameters else self.buffers.pop(name)[0]

    @torch.no_grad()
    def compute(
        self,
        outputs: Iterable[str],
        compute: Callable[..., tuple[Tensor, ...]],
        *inputs: str,
        part: Part | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute new tensors from the program's; later, if its weights are not loaded yet.

        Args:
            outputs: names that the results will have; give them to `add_parameter` and the like.
            compute: called with the inputs' tensors, or, without inputs, with the device. It must
                run on the meta device too, for shapes.
            inputs: names of parameters or buffers.
            part: all that is needed of the only input, and kept (see `Fill`).

        Returns:
            The results; on the meta device where the weights are not loaded.
        """
        arguments = [self.tensor(name) for name in inputs] if inputs else [self.device]
        if self.program.deferred is not None:
            self._fills.append(Fill(tuple(outputs), inputs, compute, part))
        return tuple(one.detach() for one in compute(*arguments))

    def replace(
        self, name: str, compute: Callable[[Tensor], Tensor], *, part: Part | None = None
    ) -> list[str]:
        """Let a tensor become what `compute` makes of it; a tied one under all its names.

        Args:
            part: as for `compute` above.

        Returns:
            Its names.
        """
        old = self.tensor(name)
        if not isinstance(old, nn.Parameter):
            (value,) = self.compute((name,), lambda given: (compute(given),), name, part=part)
            self.buffers[name] = (value, self.buffers[name][1])
            return [name]
        names = [other for other, parameter in self.parameters.items() if parameter is old]
        values = self.compute(names, lambda given: (compute(given),) * len(names), name, part=part)
        new = nn.Parameter(values[0], old.requires_grad)
        self.parameters |= dict.fromkeys(names, new)
        return names

    def set_trainable(self, names: Iterable[str], trainable: bool, *, copy: bool = False) -> None:
        """Freeze parameters, or let them train; but not those that the graph does not read.

        Args:
            copy: give the program tensors of its own; else training changes those of the given
                program too.
        """
        chosen = {id(self.parameters[name]) for name in names}
        if trainable:
            reads = self.graph.find_nodes(op="get_attr")
            chosen &= {id(self.parameters.get(str(node.target))) for node in reads}
        copies: dict[int, nn.Parameter] = {}
        for name, parameter in self.parameters.items():
            if id(parameter) in chosen and parameter.requires_grad != trainable:
                if id(parameter) not in copies:  # one copy for all the names of a tied weight
                    value = parameter.detach().clone() if copy else parameter.detach()
                    copies[id(parameter)] = nn.Parameter(value, trainable)
                self.parameters[name] = copies[id(parameter)]

    def replace_uses(self, old: fx.Node, new: fx.Node) -> None:
        """Let everything that reads `old` read `new`, but for what `new` is computed from."""
        ancestors = {new}
        stack = [new]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in ancestors:
                    ancestors.add(source)
                    stack.append(source)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in ancestors)

    def finish(
        self,
        sites: Iterable[Site],
        *,
        badge: str,
        options: Mapping[str, Any],
        numerics: str,
        ms: float,
    ) -> Program:
        """The rewritten program, with a ledger row for what changed."""
        self.graph.eliminate_dead_code()
        before = self.program
        after = Program(self.graph, self.parameters, self.buffers, self.info)
        after.train(before.training)
        after.deferred = self._deferred(numerics)
        after.distribution = self.distribution
        after.ledger = (
            *before.ledger,
            LedgerRow(
                name=self.by,
                badge=badge,
                options=dict(options),
                numerics=numerics,
                sites=tuple(dict.fromkeys(site.name for site in sites)),
                nodes=len(after.graph.nodes) - len(before.graph.nodes),
                parameters=_count(after.parameters()) - _count(before.parameters()),
                trainable=_count(after.trainable_parameters()),
                bytes=tensor_bytes(after) - tensor_bytes(before),
                ms=ms,
                figures=self.figures,
            ),
        )
        return after

    def _deferred(self, numerics: str) -> Deferred | None:
        before = self.program.deferred
        if before is None:
            return None
        claims = before.claims
        if numerics != "lossy":
            claims = (*claims, (self.by, numerics, self.program.graph, self.graph))
        return dataclasses.replace(before, fills=(*before.fills, *self._fills), claims=claims)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, tied ones counted once."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
