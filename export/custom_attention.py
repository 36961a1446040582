"""Attention by ExecuTorch's own kernels for language models, in the place of torch's operators.

`llama::update_cache` writes keys and values where they belong, and `llama::custom_sdpa` reads
of the cache only what was written. Both are in ExecuTorch's `custom_ops` library.
"""

from __future__ import annotations

import copy

import torch
from torch import fx

from graphtune.errors import UserError
from graphtune.program import Program

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
# What `KVCache` lays between a mask and its use by queries that share keys.
_REPEATS = (aten.reshape.default, aten.expand.default, aten.unsqueeze.default)


def load_custom_ops() -> None:
    """Make the operators known to torch and to the Python runtime.

    Raises:
        UserError: this installation of ExecuTorch has them not.
    """
    try:
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    except (ImportError, OSError, AssertionError) as error:
        raise UserError(
            f"`custom_sdpa`: ExecuTorch's custom operators do not load here ({error}); leave it out"
        ) from error


def with_custom_attention(program: Program) -> fx.GraphModule:
    """The graph of a program with a cache of one row, its causal attention by ExecuTorch's kernels.

    Layers with a sliding window or chunks, and attention that a model writes out, stay as they
    are. Weights are the program's own; caches are new, (1, positions, heads, channels).

    Raises:
        UserError: no attention of the program is one that the kernels compute, or they do not load.
    """
    load_custom_ops()
    graph = copy.deepcopy(program.graph)
    module = fx.GraphModule(program, graph)
    found = [node for node in graph.find_nodes(op="call_function", target=_SDPA) if _fits(node)]
    if not found:
        raise UserError(
            "`custom_sdpa`: ExecuTorch's kernels compute causal attention over a whole cache, and "
            "the model has none (windows, chunks, written out attention are others); leave it out"
        )
    positions = graph.find_nodes(op="placeholder")[1]
    with graph.inserting_before(positions.next):
        first = graph.call_function(aten.slice.Tensor, (positions, 1, 0, 1))
        start = graph.call_function(aten._local_scalar_dense.default, (first,))
    caches: dict[fx.Node, fx.Node] = {}
    for node in found:
        for kept in node.args[1:3]:
            if kept not in caches:  # layers may share them
                caches[kept] = _written(module, kept, start)
        _attend(graph, node, caches, start)
    graph.eliminate_dead_code()
    for kept in caches:  # a write is never dead of itself
        graph.erase_node(kept)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _fits(node: fx.Node) -> bool:
    """Whether the mask is `KVCache`'s of plain causal attention: a window's ends in an `and`."""
    mask = node.args[3]
    while mask.target in _REPEATS:
        mask = mask.args[0]
    kept = node.args[1:3]
    alone = all(user.target is _SDPA for one in kept for user in one.users)
    return mask.target is aten.logical_or.default and alone


def _written(module: fx.GraphModule, kept: fx.Node, start: fx.Node) -> fx.Node:
    """A cache in the kernels' layout, after their write of what `kept` writes to the program's."""
    buffer, _, value = kept.args
    owner, _, leaf = buffer.target.rpartition(".")
    parent = module.get_submodule(owner)
    parent.register_buffer(
        leaf, getattr(parent, leaf).transpose(1, 2).contiguous().clone(), persistent=False
    )
    graph = module.graph
    with graph.inserting_before(kept):
        value = graph.call_function(aten.transpose.int, (value, 1, 2))
        graph.call_function(torch.ops.llama.update_cache.default, (value, buffer, start))
    return buffer


def _attend(graph: fx.Graph, node: fx.Node, caches: dict[fx.Node, fx.Node], start: fx.Node) -> None:
    query = asked = node.args[0]
    last = node
    scale = node.kwargs.get("scale")
    width = query.meta["val"].shape[3]
    if query.target is aten.view.default:  # queries that share keys, as queries of one head
        query = query.args[0].args[0]
        for _ in range(3):  # a copy, the heads apart, and together again
            (last,) = last.users
    with graph.inserting_before(node):
        query = graph.call_function(aten.transpose.int, (query, 1, 2))
        mixed = graph.call_function(
            torch.ops.llama.custom_sdpa.default,
            (query, *(caches[kept] for kept in node.args[1:3]), start),
            {"is_causal": True, "scale": width**-0.5 if scale is None else scale},
        )
        mixed = graph.call_function(aten.transpose.int, (mixed, 1, 2))
    last.replace_all_uses_with(mixed)
    while last is not asked:  # attention, as random, would never count as dead
        last, gone = last.args[0], last
        graph.erase_node(gone)
