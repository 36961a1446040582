"""The edit primitives that passes use. They keep shapes, origin and authorship of each node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from graphtune.program import LedgerRow, Program
from graphtune.sites import Site, find_sites
from graphtune.torch_private import fake_parameter, propagate


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
    value_args, value_kwargs = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = propagate(_any_fake(graph), target, value_args, value_kwargs)
    _set_origin(node, origin, by)
    return node


def _any_fake(graph: fx.Graph) -> Any:
    return next(node.meta["val"] for node in graph.nodes if node.op == "placeholder")


def _set_origin(node: fx.Node, origin: fx.Node, by: str) -> None:
    for key in ("nn_module_stack", "stack_trace"):
        if key in origin.meta:
            node.meta[key] = origin.meta[key]
    node.meta["custom"] = {**origin.meta.get("custom", {}), "graphtune": by}


def written_by(node: fx.Node) -> str | None:
    """The pass that wrote a node; None for what capture found."""
    return node.meta.get("custom", {}).get("graphtune")


class Edit:
    """A program being rewritten by one pass.

    The graph is a copy; the tensors are those of the program until the pass replaces them.

    Attributes:
        graph: the copy to edit. Raw `torch.fx` is fine; the verifier reads what came out.
        parameters: by name; the methods below add, replace and remove entries.
        buffers: by name, with whether `state_dict` holds them.
    """

    def __init__(self, program: Program, by: str) -> None:
        self.program = program
        self.by = by
        self.graph = fx.Graph()
        result = self.graph.graph_copy(program.graph, {})
        self.graph.output(result).meta = dict(program.graph.output_node().meta)
        self.parameters = program.all_parameters()
        self.buffers = program.all_buffers()
        self._origin: fx.Node | None = None

    def sites(self, kind: str) -> list[Site]:
        """The places of one kind, in the order of the graph (see `graphtune.sites`)."""
        return [site for site in find_sites(self.graph) if site.kind == kind]

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """What `call` and `read` insert inside goes after `node` and belongs to its module."""
        self._origin = node
        with self.graph.inserting_before(node.next):
            yield

    def call(self, target: Callable, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call of an operator at the place that `after` set."""
        assert self._origin is not None, "call() belongs inside `with edit.after(node):`"
        return insert_call(self.graph, target, *args, origin=self._origin, by=self.by, **kwargs)

    def read(self, name: str) -> fx.Node:
        """Insert a read of the parameter or buffer `name` at the place that `after` set."""
        assert self._origin is not None, "read() belongs inside `with edit.after(node):`"
        tensor = self.parameters[name] if name in self.parameters else self.buffers[name][0]
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = fake_parameter(_any_fake(self.graph), tensor.shape, tensor.dtype)
        _set_origin(node, self._origin, self.by)
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

    def set_trainable(self, names: Iterable[str], trainable: bool) -> None:
        """Freeze parameters, or let them train. The given program's own stay as they are."""
        chosen = {id(self.parameters[name]) for name in names}
        copies: dict[int, nn.Parameter] = {}
        for name, parameter in self.parameters.items():
            if id(parameter) in chosen and parameter.requires_grad != trainable:
                if id(parameter) not in copies:  # one copy for all the names of a tied weight
                    copies[id(parameter)] = nn.Parameter(parameter.detach(), trainable)
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
        after = Program(self.graph, self.parameters, self.buffers, before.info)
        after.train(before.training)
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
            ),
        )
        return after


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, tied ones counted once."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
