"""CausalAttention: no mask where each row of a batch is one text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.passes.grouped_attention import share_heads
from graphtune.passes.shared_mask import as_captured, attention_mask
from graphtune.program import Program
from graphtune.rewrite import Edit
from graphtune.sites import Site, find_sites
from graphtune.verify import verify

aten = torch.ops.aten


@dataclass(frozen=True)
class CausalAttention(Pass):
    """Gives a program a second graph, for calls without an attention mask.

    In it the kernels know that attention is causal: they leave out the half of the work that a mask
    would hide, read no mask, and, on an accelerator, may be faster ones. Attention in windows,
    and all else that is derived from the mask, stays as it is. The graph for calls with a mask is
    not touched. Whatever pass comes later drops the second graph, and `save` does not keep it.

    A batch needs no mask if each row holds one text, padded at its end: no token sees the padding
    after it, and padding has no labels.
    """

    name: ClassVar[str] = "causal_attention"
    stage: ClassVar[Stage] = Stage.COMPILE
    order: ClassVar[int] = 1  # other passes would drop the graph that it makes
    conflicts: ClassVar[frozenset[str]] = frozenset({"causal_attention"})

    @property
    def numerics(self) -> Numerics:
        return "rounded"

    def __call__(self, program: Program) -> Program:
        after = super().__call__(program)
        graph = _without_mask(after.graph)
        if graph is not None:
            after.add_unmasked(graph)
            verify(program, after)
        return after

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        return [site for site in edit.sites("attention") if _is_causal(site.node)]


def _is_causal(node: fx.Node) -> bool:
    """Whether what an attention may see is told by the program's own mask, and by nothing else."""
    mask = attention_mask(node)
    return mask is not None and as_captured(mask).op == "placeholder"


def _without_mask(graph: fx.Graph) -> fx.Graph | None:
    """A copy whose attentions do without the program's mask; None where there are none."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {})).meta = dict(graph.output_node().meta)
    nodes = [s.node for s in find_sites(copy) if s.kind == "attention" and _is_causal(s.node)]
    for node in nodes:
        if len(node.args) > 3:
            node.update_arg(3, None)
        else:
            node.update_kwarg("attn_mask", None)
        if len(node.args) > 5:
            node.update_arg(5, True)
        else:
            node.update_kwarg("is_causal", True)
        share_heads(node)
    copy.eliminate_dead_code()
    return copy if nodes else None
