"""FuseAdapters: the small matrix products of low-rank adapters, made with fewer passes over memory.

Beside a frozen weight the products of an adapter are a few percent of the work, and take far more
of the time: each reads or writes a whole activation for a handful of numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.recomputation import carry_tags
from graphtune.rewrite import Edit
from graphtune.sites import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseAdapters(Pass):
    """Rewrites `scaling * B(A(x))` of LoRA and DoRA in three ways.

    Adapters of one input (`q_proj`, `k_proj`, `v_proj`; `gate_proj`, `up_proj`) read it once: their
    A are laid on one another, in each step, and multiplied together. `scaling` multiplies what A
    gives, (tokens, rank), rather than what B gives, (tokens, out_features), which saves its
    backward pass a tensor of that size. B is read transposed, so that its gradient is the product
    of a short matrix and a long one, not of two narrow ones.

    Parameters keep their names and shapes. Sums are added up in another order: logits and gradients
    are the same up to rounding. A program without adapters stays as it is, and so do adapters of
    embeddings and of experts. With dropout each site draws its own, and only the last two apply.
    """

    name: ClassVar[str] = "fuse_adapters"
    stage: ClassVar[Stage] = Stage.COMPILE
    conflicts: ClassVar[frozenset[str]] = frozenset({"fuse_adapters"})

    @property
    def numerics(self) -> Numerics:
        return "rounded"

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        pairs = _pairs(edit.graph)
        for down, up in pairs:
            _scale_early(edit, down, up)
            _transpose_up(edit, up)
        groups: dict[object, list[fx.Node]] = {}
        for down, _ in pairs:
            groups.setdefault(_same_input(down), []).append(down)
        for group in groups.values():
            if len(group) > 1:
                _together(edit, group)
        names = {str(down.args[1].target).rpartition(".lora_A.")[0] for down, _ in pairs}
        return [site for site in edit.sites("linear") if site.name in names]


def _pairs(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """A and B of each adapted linear: `linear(x, A)`, and `linear` of that."""
    found = []
    for up in graph.find_nodes(op="call_function", target=aten.linear.default):
        down = up.args[0]
        linears = _reads(up, ".lora_B.") and down.target is aten.linear.default
        if linears and _reads(down, ".lora_A.") and list(down.users) == [up]:
            found.append((down, up))
    return found


def _reads(linear: fx.Node, part: str) -> bool:
    weight = linear.args[1]
    return weight.op == "get_attr" and part in weight.target


def _scale_early(edit: Edit, down: fx.Node, up: fx.Node) -> None:
    """`B(A(x)) * scaling` -> `B(A(x) * scaling)`."""
    user = next(iter(up.users))
    if len(up.users) > 1 or user.target is not aten.mul.Tensor or user.args[0] is not up:
        return
    if isinstance(user.args[1], fx.Node):  # DoRA scales each output by a number of its own first
        return
    with edit.after(down, **down.meta["custom"]):
        scaled = carry_tags(edit.call(aten.mul.Tensor, down, user.args[1]), user)
    up.replace_input_with(down, scaled)
    user.replace_all_uses_with(up)


def _transpose_up(edit: Edit, up: fx.Node) -> None:
    """The same product with B laid out as (rank, out_features), which autograd follows."""
    low, weight = up.args
    with edit.after(up, **up.meta["custom"]):
        turned = carry_tags(edit.call(aten.t.default, weight), up)
        turned = edit.call(aten.clone.default, turned, memory_format=torch.contiguous_format)
        carry_tags(turned, up)
        up.replace_all_uses_with(carry_tags(edit.call(aten.matmul.default, low, turned), up))


def _same_input(down: fx.Node) -> tuple[fx.Node, torch.dtype]:
    """What two adapters must share to be applied together; each casts its input for itself."""
    x = down.args[0]
    source = x.args[0] if x.target is aten.to.dtype and len(x.args) == 2 else x
    return source, down.meta["val"].dtype


def _together(edit: Edit, group: list[fx.Node]) -> None:
    first = group[0]
    ranks = [down.meta["val"].shape[-1] for down in group]
    with edit.after(first.prev, origin=first, **first.meta["custom"]):
        weights = [edit.read(down.args[1].target) for down in group]
        stacked = carry_tags(edit.call(aten.cat.default, weights, 0), first)
        low = carry_tags(edit.call(aten.linear.default, first.args[0], stacked), first)
        parts = carry_tags(edit.call(aten.split_with_sizes.default, low, ranks, -1), first)
        for index, down in enumerate(group):
            part = carry_tags(edit.call(operator.getitem, parts, index), down)
            part.meta["custom"] = dict(down.meta["custom"])
            part.meta["nn_module_stack"] = down.meta["nn_module_stack"]
            down.replace_all_uses_with(part)
