"""Find the places in a graph, or in a model not yet captured, that a pass can act on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

from graphtune.fake_quantization import fake_quantize_weight

aten = torch.ops.aten
Kind = Literal["linear", "embedding", "experts", "attention"]

# By name: the first exists only once transformers' own module is imported.
_GROUPED_MM = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")


@dataclass(frozen=True)
class Site:
    """A place in the graph that a pass can act on.

    Attributes:
        name: qualified name of the module that made the node, as in the checkpoint; for experts,
            whose weights are parameters of one module, of the parameter.
        kind: "linear", "embedding", "experts" (a grouped matmul) or "attention".
        node: the call; its arguments are read through the properties below.
        weight: the node that gives the weight as it is stored, before fake quantization; None for
            attention.
        transposed: the weight is stored (in, out), as in GPT-2's `Conv1D`, instead of (out, in).
        in_all_linear: whether the rule `all-linear` covers the site.
    """

    name: str
    kind: Kind
    node: fx.Node
    weight: Any = None
    transposed: bool = False
    in_all_linear: bool = False

    @property
    def input(self) -> fx.Node:
        """What the linear, the embedding or the experts are applied to."""
        last = self.kind == "embedding" or self.node.target is aten.addmm.default
        return self.node.args[1 if last else 0]

    @property
    def bias(self) -> fx.Node | None:
        """What a linear adds, (out_features,), or None."""
        if self.node.target is aten.addmm.default:
            return self.node.args[0]
        if self.kind == "linear" and len(self.node.args) > 2:
            return self.node.args[2]
        return None

    @property
    def output(self) -> fx.Node:
        """The last node of the module: an embedding that is scaled is not yet the output."""
        return self.tail[-1] if self.tail else self.node

    @property
    def tail(self) -> list[fx.Node]:
        """What the module of an embedding does to its rows, such as scaling them."""
        tail: list[fx.Node] = []
        node = self.node
        while self.kind == "embedding" and len(node.users) == 1:
            node = next(iter(node.users))
            if module_of(node)[0] != self.name or "graphtune" in node.meta.get("custom", {}):
                break
            tail.append(node)
        return tail

    @property
    def parameter(self) -> str:
        """Name of the weight in the checkpoint."""
        return self.name if self.kind == "experts" else f"{self.name}.weight"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the weight as the checkpoint has it."""
        assert self.weight is not None
        return tuple(self.weight.meta["val"].shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out_features, in_features) of a linear, (rows, width) of an embedding, (experts,
        out_features, in_features) of experts."""
        *first, rows, columns = self.stored_shape
        return (*first, columns, rows) if self.transposed else (*first, rows, columns)


def module_of(node: fx.Node) -> tuple[str, str]:
    """Qualified name and class path of the module that made a node; ("", "") for none."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1] if stack else ("", "")


def layer_of(node: fx.Node) -> str | None:
    """Name of the numbered layer that a node belongs to, `model.layers.3`, or None."""
    parts = module_of(node)[0].split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def find_sites(graph: fx.Graph) -> Iterator[Site]:
    """All sites of a graph, in its order. What passes inserted is not a site."""
    head = output_head(graph)
    for node in graph.nodes:
        if "graphtune" in node.meta.get("custom", {}):
            continue
        name, kind = module_of(node)
        plain = name != head and kind.rsplit(".", 1)[-1] in ("Linear", "Conv1D")
        if node.target is aten.linear.default:
            plain = plain and _transforms(node.args[1].meta["val"].shape)
            yield Site(name, "linear", node, _stored(node.args[1]), in_all_linear=plain)
        elif node.target is aten.addmm.default:
            plain = plain and _transforms(node.args[2].meta["val"].shape)
            weight = _stored(node.args[2])
            yield Site(name, "linear", node, weight, transposed=True, in_all_linear=plain)
        elif node.target is aten.embedding.default:
            yield Site(name, "embedding", node, _stored(node.args[0]))
        elif str(node.target) in _GROUPED_MM:
            yield _experts(name, node)
        elif node.target is aten.scaled_dot_product_attention.default:
            yield Site(name, "attention", node)


def _transforms(shape: tuple[int, ...]) -> bool:
    """Whether a weight transforms hidden states, as `all-linear` means it; a gate has one row.

    A router of experts is no `Linear` by its class.
    """
    return min(shape) > 1


def _stored(weight: fx.Node) -> fx.Node:
    """What a weight is before fake quantization."""
    return weight.args[0] if weight.target is fake_quantize_weight else weight


def _experts(module: str, node: fx.Node) -> Site:
    """A grouped matmul takes (experts, in, out); most models store (experts, out, in)."""
    weight, transposed = node.args[1], True
    while weight.target is aten.transpose.int:
        weight, transposed = weight.args[0], not transposed
    weight = _stored(weight)
    leaf = weight.meta.get("custom", {}).get("parameter") or weight.target
    return Site(
        f"{module}.{str(leaf).rsplit('.', 1)[-1]}", "experts", node, weight, transposed, True
    )


def output_head(graph: fx.Graph) -> str | None:
    """Name of the linear that makes the logits (`lm_head`), or None."""
    node = graph.output_node().args[0]
    while isinstance(node, fx.Node) and node.all_input_nodes:
        if node.target is aten.linear.default and "graphtune" not in node.meta.get("custom", {}):
            return module_of(node)[0]
        node = node.all_input_nodes[0]
    return None


@dataclass(frozen=True)
class ModuleSite:
    """What will be a site once the model is captured; enough for rules and shapes.

    Attributes: as those of `Site`.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    in_all_linear: bool


def module_sites(model: nn.Module) -> Iterator[ModuleSite]:
    """The linears, embeddings and experts of a model, without capturing it."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            stored = tuple(parameter.shape)
            if len(stored) == 3:
                yield ModuleSite(f"{name}.{leaf}", "experts", stored, stored, True)
            elif len(stored) == 2 and leaf == "weight":
                conv1d = isinstance(module, Conv1D)
                shape = (stored[1], stored[0]) if conv1d else stored
                plain = module is not head and (conv1d or isinstance(module, nn.Linear))
                plain = plain and _transforms(stored)
                kind: Kind = "embedding" if isinstance(module, nn.Embedding) else "linear"
                yield ModuleSite(name, kind, shape, stored, plain)
