"""CausalAttention: no mask where tokens see all that is before them in their text."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphtune.document_attention import document_attention
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.passes.grouped_attention import share_heads
from graphtune.passes.shared_mask import as_captured, attention_mask
from graphtune.program import Program
from graphtune.recomputation import carry_tags
from graphtune.rewrite import Edit, insert_call
from graphtune.sites import Site, find_sites
from graphtune.torch_private import symbolic_input
from graphtune.verify import check_close, eval_output, probe_ids, verify

aten = torch.ops.aten


@dataclass(frozen=True)
class CausalAttention(Pass):
    """Gives a program more graphs, for calls without an attention mask.

    In one, each row is one text, and kernels know that attention is causal: they leave out the half
    of the work that a mask would hide, read no mask, and, on an accelerator, may be faster ones.
    Padding at a row's end needs no mask: no token sees what comes after it, and padding has no
    labels.

    In the other, only on a CPU, rows hold several texts or padding, and attention is told where
    each document lies (see `graphtune.masks.find_documents`): it does the work of each alone,
    instead of all of (seq, seq). A training step calls it for batches that have positions and no
    mask.

    Attention in windows, and all else that is derived from the mask, stays as it is; with documents
    attention with dropout does, too. The graph for calls with a mask is not touched. Whatever pass
    comes later drops the other graphs, and `save` does not keep them.
    """

    name: ClassVar[str] = "causal_attention"
    stage: ClassVar[Stage] = Stage.COMPILE
    order: ClassVar[int] = 1  # other passes would drop the graphs that it makes
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
        if next(after.parameters()).device.type == "cpu":
            self._pack(program, after)
        return after

    def _pack(self, program: Program, after: Program) -> None:
        """Add the graph for documents; its output must be that with a mask."""
        graph = _with_documents(after.graph)
        if graph is None:
            return
        after.add_packed(graph)
        ids = probe_ids(after)
        positions = torch.arange(7).remainder(4).expand(ids.shape)  # two documents in each row
        expected, found = (eval_output(one, ids, positions) for one in (program, after))
        check_close(expected, found, self.name, self.numerics)

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        return [site for site in edit.sites("attention") if _is_causal(site.node)]


def _is_causal(node: fx.Node) -> bool:
    """Whether what an attention may see is told by the program's own mask, and by nothing else."""
    mask = attention_mask(node)
    return mask is not None and as_captured(mask).op == "placeholder"


def _causal(graph: fx.Graph) -> tuple[fx.Graph, list[fx.Node]]:
    """A copy of a graph, and its attentions that are told by the program's mask alone."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {})).meta = dict(graph.output_node().meta)
    sites = (site for site in find_sites(copy) if site.kind == "attention")
    return copy, [site.node for site in sites if _is_causal(site.node)]


def _without_mask(graph: fx.Graph) -> fx.Graph | None:
    """A copy whose attentions do without the program's mask; None where there are none."""
    copy, nodes = _causal(graph)
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


def _with_documents(graph: fx.Graph) -> fx.Graph | None:
    """A copy that takes documents, and whose attentions are told by them; None where none can."""
    copy, nodes = _causal(graph)
    nodes = [node for node in nodes if _has_kernel(node)]
    if not nodes:
        return None
    *_, last = copy.find_nodes(op="placeholder")
    with copy.inserting_before(last.next):
        documents = copy.placeholder("documents")
    documents.meta = {
        "val": symbolic_input(last.meta["val"], (None, 2)),
        "custom": {"graphtune": CausalAttention.name},
    }
    for node in nodes:
        share_heads(node)
        query, key, value = node.args[:3]
        scale = node.kwargs.get("scale")
        if scale is None:
            scale = 1 / math.sqrt(query.meta["val"].shape[-1])
        with copy.inserting_before(node):
            given = query, key, value, documents, scale
            by = {"origin": node, "by": CausalAttention.name}
            both = insert_call(copy, document_attention, *given, **by)
            out = insert_call(copy, operator.getitem, both, 0, **by)
        for one in (both, out):
            carry_tags(one, node)
        node.replace_all_uses_with(out)
        copy.erase_node(node)
    _measure_ids(copy)
    copy.eliminate_dead_code()
    return copy


def _measure_ids(graph: fx.Graph) -> None:
    """Let what reads sizes of the mask, which may be none, read them of the ids."""
    ids, *others = graph.find_nodes(op="placeholder")
    (mask,) = (node for node in others if node.target == "attention_mask")
    sizes = [str(size) for size in ids.meta["val"].shape]
    for node in [user for user in mask.users if user.target is aten.sym_size.int]:
        if (size := str(node.meta["val"])) in sizes:
            node.args = (ids, sizes.index(size))


def _has_kernel(node: fx.Node) -> bool:
    """Whether an attention is one that the kernel for documents computes: it drops nothing."""
    query, _, value = (one.meta["val"] for one in node.args[:3])
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p")
    same = query.dim() == 4 and query.shape[-1] == value.shape[-1]
    return same and not dropout and not isinstance(node.kwargs.get("scale"), fx.Node)
