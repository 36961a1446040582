"""Shapes of a graph's nodes, propagated as the graph is made or changed.

To work out symbolic sizes takes long, for all nodes longer than to capture the model again; but
layers are alike. So what an operator made of some shapes is kept with the graph, and given to each
node where it meets them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from graphtune.program import LedgerRow
from graphtune.torch_private import (
    fake_parameter,
    propagate,
    size_expression,
    symbolic_input,
    symbolic_inputs,
)

_known: WeakKeyDictionary[fx.Graph, dict[Any, Any]] = WeakKeyDictionary()


def of_call(node: fx.Node) -> Any:
    """The (symbolic) shape of a call's result, from those of its inputs."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    key = (node.target, _look(args), _look(kwargs))
    return _once(node.graph, key, lambda like: propagate(like, node.target, args, kwargs))


def of_read(graph: fx.Graph, tensor: Tensor) -> Any:
    """What stands in a graph for a parameter or a buffer."""
    key = ("read", tensor.shape, tensor.dtype)
    return _once(graph, key, lambda like: fake_parameter(like, tensor.shape, tensor.dtype))


def _once(graph: fx.Graph, key: tuple[Any, ...], make: Callable[[Any], Any]) -> Any:
    like = next(node.meta["val"] for node in graph.nodes if node.op == "placeholder")
    known = _known.setdefault(graph, {})
    world = (like.fake_mode, *key)  # the same symbols of another one are other sizes
    if world not in known:
        known[world] = make(like)
    return known[world]


def _look(value: Any) -> Any:
    """What tells one argument of an operator from another."""
    if isinstance(value, Tensor):
        sizes = map(size_expression, (*value.shape, *value.stride()))
        return value.dtype, value.device, *sizes
    if isinstance(value, tuple | list):
        return tuple(map(_look, value))
    if isinstance(value, Mapping):
        return tuple((key, _look(one)) for key, one in value.items())
    if isinstance(value, int | torch.SymInt):
        return type(value), size_expression(value)
    return type(value), repr(value)


class Shapes:
    """Shapes for a graph in a fake world of their own.

    Args:
        tensors: what the graph reads, by name.
        batch: the batch size that the graph is for; None where it is free.
    """

    def __init__(self, tensors: Mapping[str, Tensor], batch: int | None = None) -> None:
        self.tensors = tensors
        ids, mask, positions = symbolic_inputs(next(iter(tensors.values())).device, batch)
        self.inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        self.like: Any = ids
        self.added: dict[tuple[int | None, ...], Tensor] = {}

    def of_input(self, name: str, shape: Sequence[int | None], dtype: torch.dtype) -> Tensor:
        """An input. Those that passes added, and images, have one free size, the same for the
        same shape; what else is not fixed is as the ids are."""
        if name in self.inputs:
            return self.inputs[name]
        if list(shape) == [None, None]:
            return torch.empty_like(self.like, dtype=dtype)
        key = tuple(shape)
        if key not in self.added:
            self.added[key] = symbolic_input(self.like, shape)
        return self.added[key].to(dtype)

    def of(self, node: fx.Node) -> Any:
        """What `node.meta["val"]` is to be; the nodes before it have theirs already."""
        if node.op == "placeholder":
            was = node.meta["val"]
            sizes = [size if isinstance(size, int) else None for size in was.shape]
            return self.of_input(str(node.target), sizes, was.dtype)
        if node.op == "get_attr":
            tensor = self.tensors.get(node.target)
            return True if tensor is None else of_read(node.graph, tensor)  # the training flag
        return of_call(node)


def propagate_all(graph: fx.Graph, tensors: Mapping[str, Tensor], batch: int | None) -> None:
    """Give every node of a graph the shape that it has now; arguments as those of `Shapes`."""
    shapes = Shapes(tensors, batch)
    for node in graph.nodes:
        if node.op != "output":
            node.meta["val"] = shapes.of(node)


def fixed_batch(ledger: Iterable[LedgerRow]) -> int | None:
    """The batch size that a program's key-value cache is for; None where it is free."""
    return next((row.options["batch"] for row in ledger if row.name == "kv_cache"), None)
