"""SharedMask: one additive mask for all layers, instead of one that each makes of a boolean one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.rewrite import Edit, written_by
from graphtune.sites import Site, layer_of

aten = torch.ops.aten


@dataclass(frozen=True)
class SharedMask(Pass):
    """Makes the boolean masks that layers share additive, once, before the first layer.

    Attention adds a mask of 0 and -inf, (batch, 1, seq, seq) in the dtype of its queries, and makes
    it of a boolean one in every layer. Where each layer is compiled by itself each would keep its
    own for the backward pass.
    """

    name: ClassVar[str] = "shared_mask"
    stage: ClassVar[Stage] = Stage.COMPILE
    conflicts: ClassVar[frozenset[str]] = frozenset({"shared_mask"})

    @property
    def numerics(self) -> Numerics:
        return "exact"

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        changed = []
        *_, last_input = edit.graph.find_nodes(op="placeholder")
        for site in edit.sites("attention"):
            mask = attention_mask(site.node)
            if mask is None or mask.meta["val"].dtype != torch.bool or layer_of(mask) is not None:
                continue
            dtype = site.node.args[0].meta["val"].dtype
            if (mask, dtype) not in made:
                place = last_input if mask.op == "placeholder" else mask
                with edit.after(place, origin=mask):
                    zero = edit.call(aten.zeros_like.default, mask, dtype=dtype)
                    hidden = edit.call(aten.logical_not.default, mask)
                    made[mask, dtype] = edit.call(aten.masked_fill.Scalar, zero, hidden, -math.inf)
            site.node.replace_input_with(mask, made[mask, dtype])
            changed.append(site)
        return changed


def attention_mask(node: fx.Node) -> fx.Node | None:
    """The mask that an attention is given, or None."""
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def as_captured(mask: fx.Node) -> fx.Node:
    """The mask that SharedMask made a mask of; without the pass, the mask itself."""
    if mask.target is aten.masked_fill.Scalar and written_by(mask) == SharedMask.name:
        return mask.args[1].args[0]
    return mask
