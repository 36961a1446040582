"""ActivationCheckpoint: less memory between the forward and the backward pass.

Checkpointing: Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174).
Selecting what is saved by work per byte: Korthikanti et al., Reducing Activation Recomputation in
Large Transformer Models (arXiv:2205.05198).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from graphtune.errors import UserError
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.recomputation import FREE, OFFLOAD, RECOMPUTE, SAVE, tag
from graphtune.rewrite import Edit
from graphtune.rules import Named, match
from graphtune.sites import Site, layer_of

aten = torch.ops.aten
MODES = ("none", "full", "selective", "budget", "offload")


@dataclass(frozen=True)
class ActivationCheckpoint(Pass):
    """Says which results of each layer are saved for the backward pass; the others are computed
    again there, with the same random numbers.

    Nothing in the graph is changed but tags, which `torch.compile`'s partitioner reads; without a
    compiler the step runs the layers under `torch.utils.checkpoint` (see
    `graphtune.recomputation`). What lies outside of the numbered layers (embedding, last norm,
    head, loss) is left to the compiler. Apply it after the passes that add to the layers.

    Attributes:
        mode: `none`: as without the pass. `full`: of each layer only its input is saved.
            `selective`: also what takes much work for few bytes, attention and linears (and
            experts) whose output is no wider than their input. `budget`: the compiler saves
            `budget` of what it would, and chooses the rest by its own estimate of time. `offload`:
            what is saved waits in the CPU's memory.
        budget: from 0 (save next to nothing) to 1 (as `none`), for the mode `budget` alone.
        save: patterns of what is saved beyond that, in the mode `selective`: names of modules
            (`down_proj`, `*.mlp`, `re:...`) or of operators (`silu`, `aten.mul`).
        recompute: patterns of what is not; what both name is saved.
        layers: only these layers, such as `[0, 8..15]`; None for all. The mode `budget` has all.
    """

    mode: Literal["none", "full", "selective", "budget", "offload"] = "selective"
    budget: float | None = None
    save: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    layers: tuple[int | str, ...] | None = None

    name: ClassVar[str] = "activation_checkpoint"
    stage: ClassVar[Stage] = Stage.CHECKPOINT
    conflicts: ClassVar[frozenset[str]] = frozenset({"activation_checkpoint"})

    def __post_init__(self) -> None:
        key = "passes.activation_checkpoint"
        for name in ("save", "recompute"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
            if given and self.mode != "selective":
                raise UserError(f"`{key}.{name}` is for `mode=selective`, not `mode={self.mode}`")
        if self.mode not in MODES:
            raise UserError(f"`{key}.mode={self.mode}` must be one of {', '.join(MODES)}")
        if (self.mode == "budget") != (self.budget is not None):
            raise UserError(f"`{key}.budget={self.budget}` goes with `mode=budget`, and only so")
        if self.budget is not None and not 0 <= self.budget <= 1:
            raise UserError(f"`{key}.budget={self.budget}` must be from 0 to 1")
        if self.mode == "budget" and self.layers is not None:
            raise UserError(f"`{key}.layers` does not go with `mode=budget`, which is of the whole")

    @property
    def numerics(self) -> Numerics:
        return "exact"

    @property
    def badge(self) -> str:
        share = "" if self.budget is None else f" {self.budget:g}"
        return f"ckpt {self.mode}{share}"

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        layers = self._layers(edit.graph)
        if self.mode == "offload" and edit.device.type == "cpu":
            raise UserError(
                "`passes.activation_checkpoint.mode=offload` moves activations to the CPU's "
                "memory, where they are already; take full or selective"
            )
        if self.mode == "none":
            return []
        kept = self._kept(layers) if self.mode == "selective" else set()
        for region, nodes in enumerate(layers.values()):
            for node in nodes:
                if self.mode in ("budget", "offload"):
                    if "recompute" not in node.meta:  # else a weight that is never kept
                        tag(node, FREE if self.mode == "budget" else OFFLOAD, region, self.budget)
                else:
                    # What is tagged already is a dequantized weight; it joins its layer, or it
                    # would be saved on its way into it.
                    policy = SAVE if node in kept and "recompute" not in node.meta else RECOMPUTE
                    tag(node, policy, region)
            if self.mode in ("full", "selective"):
                _save_outputs(nodes, region)
        inside = {node for nodes in layers.values() for node in nodes}
        return [s for s in edit.sites("linear", "experts", "attention") if s.node in inside]

    def _layers(self, graph: fx.Graph) -> dict[str, list[fx.Node]]:
        """The calls of each layer that is meant, by the layer's name."""
        layers: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            layer = layer_of(node)
            if layer and node.op == "call_function" and _has_tensors(node.meta["val"]):
                layers.setdefault(layer, []).append(node)
        if not layers:
            raise UserError("`passes.activation_checkpoint`: the model has no numbered layers")
        key = "passes.activation_checkpoint.targets"  # errors name its neighbour, `layers`
        chosen = match(map(Named, layers), ["*"], layers=self.layers, key=key)
        return {name: nodes for name, nodes in layers.items() if name in chosen}

    def _kept(self, layers: dict[str, list[fx.Node]]) -> set[fx.Node]:
        """The nodes whose results the mode `selective` saves."""
        named = {node: _names(node) for nodes in layers.values() for node in nodes}
        places = [Named(name) for name in dict.fromkeys(n for all_ in named.values() for n in all_)]
        save, recompute = (
            match(places, patterns, key=f"passes.activation_checkpoint.{option}").keys()
            for option, patterns in (("save", self.save), ("recompute", self.recompute))
        )
        return {
            node
            for node, names in named.items()
            if not save.isdisjoint(names) or (_is_dear(node) and recompute.isdisjoint(names))
        }


def _has_tensors(value: object) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor)


def _names(node: fx.Node) -> tuple[str, ...]:
    """What rules may call a node: the modules that it is part of, and its operator."""
    modules = [name for name, _ in node.meta["nn_module_stack"].values() if name]
    name = str(node.target).rpartition(".")[0]  # without the overload
    return *modules, name or node.target.__name__


def _is_dear(node: fx.Node) -> bool:
    """Whether a result takes much work for its size: each number is a long sum of products."""
    if node.target is aten.scaled_dot_product_attention.default:
        return True
    if node.target is aten.linear.default or "grouped_mm" in str(node.target):
        source = node.args[0]
    elif node.target is aten.addmm.default:
        source = node.args[1]
    else:
        return False
    return node.meta["val"].shape[-1] <= source.meta["val"].shape[-1]


def _save_outputs(nodes: list[fx.Node], region: int) -> None:
    """Save what others read of a layer; else the last one would run again for what follows it."""
    inside = set(nodes)
    for node in nodes:
        if node.users.keys() - inside:
            tag(node, SAVE, region)
            while _is_view(node) and node.args[0] in inside:  # it is no tensor of its own
                node = node.args[0]
                tag(node, SAVE, region)


def _is_view(node: fx.Node) -> bool:
    return node.target in (operator.getitem, aten.reshape.default) or getattr(
        node.target, "is_view", False
    )
