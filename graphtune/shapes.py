"""Shapes of all nodes of a graph, propagated anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphtune.program import LedgerRow
from graphtune.torch_private import fake_parameter, propagate, symbolic_input, symbolic_inputs


class Shapes:
    """Shapes of nodes in one fake world.

    Layers are alike, so that most are found where the same operator met the same shapes before;
    to propagate all of them takes longer than to capture the model again.

    Args:
        tensors: what the graph reads, by name.
        batch: the batch size that the graph is for; None where it is free.
    """

    def __init__(self, tensors: Mapping[str, Tensor], batch: int | None = None) -> None:
        self.tensors = tensors
        ids, mask, positions = symbolic_inputs(next(iter(tensors.values())).device, batch)
        self.inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        self.like: Any = ids
        self.known: dict[tuple[Any, ...], Any] = {}
        self.first: dict[Any, Any] = {}  # equal values are one object, so that keys meet

    def of_input(self, name: str, shape: Sequence[int | None], dtype: torch.dtype) -> Tensor:
        """An input. Those that passes added, and images, have one free size, the same for the
        same shape; what else is not fixed is as the ids are."""
        if name in self.inputs:
            return self.inputs[name]
        if list(shape) == [None, None]:
            return torch.empty_like(self.like, dtype=dtype)
        key = ("input", *shape)
        if key not in self.known:
            self.known[key] = symbolic_input(self.like, shape)
        return self.known[key].to(dtype)

    def of(self, node: fx.Node) -> Any:
        """What `node.meta["val"]` is to be; the nodes before it have theirs already."""
        if node.op == "placeholder":
            was = node.meta["val"]
            sizes = [size if isinstance(size, int) else None for size in was.shape]
            return self.of_input(str(node.target), sizes, was.dtype)
        if node.op == "get_attr":
            tensor = self.tensors.get(node.target)
            if tensor is None:
                return True  # the training flag
            key: tuple[Any, ...] = (tensor.shape, tensor.dtype)
            make = lambda: fake_parameter(self.like, tensor.shape, tensor.dtype)  # noqa: E731
        else:
            values = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            same = fx.node.map_arg((node.args, node.kwargs), lambda n: id(n.meta["val"]))
            key = (node.target, repr(same))
            make = lambda: propagate(self.like, node.target, *values)  # noqa: E731
        if key not in self.known:
            made = make()
            self.known[key] = self.first.setdefault(_look(made), made)
        return self.known[key]


def propagate_all(graph: fx.Graph, tensors: Mapping[str, Tensor], batch: int | None) -> None:
    """Give every node of a graph the shape that it has now; arguments as those of `Shapes`."""
    shapes = Shapes(tensors, batch)
    for node in graph.nodes:
        if node.op != "output":
            node.meta["val"] = shapes.of(node)


def fixed_batch(ledger: Iterable[LedgerRow]) -> int | None:
    """The batch size that a program's key-value cache is for; None where it is free."""
    return next((row.options["batch"] for row in ledger if row.name == "kv_cache"), None)


def _look(value: Any) -> Any:
    """What tells one shape-only value from another."""
    if isinstance(value, Tensor):
        return str(value.shape), str(value.stride()), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(map(_look, value))
    return type(value), str(value)
