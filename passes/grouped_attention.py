"""GroupedAttention: attention reads keys and values that heads share, instead of copies of them.

Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models (arXiv:2305.13245).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.rewrite import Edit
from graphtune.sites import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class GroupedAttention(Pass):
    """Takes out the repeating of keys and values before attention (`enable_gqa`).

    Only on a CPU, whose kernel takes grouped heads with a mask; on an accelerator a mask and
    grouped heads together leave nothing but the slowest kernel. `CausalAttention` groups the heads
    of a graph without a mask on every device. Gradients of keys and values are added up in another
    order.
    """

    name: ClassVar[str] = "grouped_attention"
    stage: ClassVar[Stage] = Stage.COMPILE
    conflicts: ClassVar[frozenset[str]] = frozenset({"grouped_attention"})

    @property
    def numerics(self) -> Numerics:
        return "rounded"

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        if edit.device.type != "cpu":
            return []
        return [site for site in edit.sites("attention") if share_heads(site.node)]


def share_heads(node: fx.Node) -> bool:
    """Let an attention read keys and values before they are repeated; whether they were."""
    query, *repeated = node.args[:3]
    key, value = (_before_repeat(one, query.meta["val"].shape[1]) for one in repeated)
    if key is None or value is None:
        return False
    node.args = (query, key, value, *node.args[3:])
    node.update_kwarg("enable_gqa", True)
    return True


def _before_repeat(node: fx.Node, heads: int) -> fx.Node | None:
    """`x` (batch, shared, seq, width) of what repeats each of its heads, or None.

    `x[:, :, None].expand(batch, shared, times, seq, width).reshape(batch, heads, seq, width)`
    """
    targets = (aten.reshape.default, aten.expand.default, aten.unsqueeze.default)
    chain = [node]
    for target in targets:
        if chain[-1].target is not target:
            return None
        chain.append(chain[-1].args[0])
    _, expand, unsqueeze, x = chain
    shared, times = expand.meta["val"].shape[1:3]
    right = unsqueeze.args[1] == 2 and x.meta["val"].shape[1] == shared
    return x if right and shared * times == heads == node.meta["val"].shape[1] else None
