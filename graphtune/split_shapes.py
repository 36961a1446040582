"""What operators that lay out or cut make of results that are split over ranks.

Rules as in `graphtune.split_rules`, which has those of all other operators.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphtune.splitting import Partial, Rule, Split, Spread

aten = torch.ops.aten
SHAPES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        SHAPES.update(dict.fromkeys(targets, function))
        return function

    return register


def source_layout(spread: Spread, node: fx.Node) -> Split | None:
    """Layout of the first input, added up if need be."""
    spread.replace_inputs(node, spread.summed)
    layout = spread.layouts.get(node.args[0])
    assert not isinstance(layout, Partial)
    return layout


def rank_of(node: fx.Node) -> int:
    """How many dimensions the first input has."""
    return node.args[0].meta["val"].dim()


@_rule(operator.getitem)
def _getitem(spread: Spread, node: fx.Node) -> Any:
    return spread.layouts[node.args[0]][node.args[1]]


def _moved(layout: Split, dim: int) -> Split:
    return Split(dim, layout.pieces, layout.sequence)


@_rule(aten.transpose.int)
def _transpose(spread: Spread, node: fx.Node) -> Any:
    layout = source_layout(spread, node)
    if layout is None:
        return None
    a, b = (dim if dim < 0 else dim - rank_of(node) for dim in node.args[1:])
    return _moved(layout, {a: b, b: a}.get(layout.dim, layout.dim))


@_rule(aten.t.default)
def _t(spread: Spread, node: fx.Node) -> Any:
    layout = source_layout(spread, node)
    return layout and _moved(layout, {-1: -2, -2: -1}[layout.dim])


@_rule(aten.permute.default)
def _permute(spread: Spread, node: fx.Node) -> Any:
    layout = source_layout(spread, node)
    if layout is None:
        return None
    order = [dim if dim < 0 else dim - rank_of(node) for dim in node.args[1]]
    return _moved(layout, order.index(layout.dim) - len(order))


@_rule(aten.unsqueeze.default)
def _unsqueeze(spread: Spread, node: fx.Node) -> Any:
    layout = source_layout(spread, node)
    if layout is None:
        return None
    dim = node.args[1] if node.args[1] < 0 else node.args[1] - rank_of(node) - 1
    return _moved(layout, layout.dim - (dim >= layout.dim))


@_rule(aten.select.int)
def _select(spread: Spread, node: fx.Node) -> Any:
    layout = source_layout(spread, node)
    if layout is None:
        return None
    dim = node.args[1] if node.args[1] < 0 else node.args[1] - rank_of(node)
    if dim == layout.dim:
        spread.refuse(node, "it selects from what is split")
    return _moved(layout, layout.dim + (dim > layout.dim))


@_rule(aten.expand.default)
def _expand(spread: Spread, node: fx.Node) -> Any:
    layout = source_layout(spread, node)
    if layout is None:
        return None
    sizes = list(node.args[1])
    if isinstance(sizes[layout.dim], int) and sizes[layout.dim] != -1:
        sizes[layout.dim] = spread.divide(node, sizes[layout.dim], "heads")
    node.args = (node.args[0], sizes)
    return layout


@_rule(aten.view.default, aten.reshape.default)
def _view(spread: Spread, node: fx.Node) -> Any:
    x, sizes = node.args
    layout = spread.layouts.get(x)
    before, after = spread.full(x), spread.full(node)
    if isinstance(layout, Partial):
        if before[-1] == after[-1]:
            return layout
        layout = source_layout(spread, node)
    if layout is None:
        return None
    if layout.sequence:
        # A Conv1D flattens its tokens first; what comes after is then part of its work.
        column = all(isinstance(spread.layouts.get(user.args[-1]), Split) for user in node.users)
        node.args = (spread.entered(x) if column else spread.whole(x), sizes)
        if column:
            spread.is_entered(node)
        return None
    dim = _dim_after(before, after, layout.dim)
    if dim is None or (len(layout.pieces) > 1 and before[layout.dim] != after[dim]):
        spread.refuse(node, f"its result of shape {before} is viewed as {after}")
        return None
    sizes = list(sizes)
    local = spread.divide(
        node, after[dim], "heads" if before[layout.dim] != after[dim] else "outputs"
    )
    if sizes[dim] != -1:
        sizes[dim] = local
    node.args = (x, sizes)
    return _moved(layout, dim)


def _dim_after(before: tuple[int, ...], after: tuple[int, ...], dim: int) -> int | None:
    """Where a dimension, from the end, begins in a view: the first of those it is made into."""
    i = j = 0
    while i < len(before) and j < len(after):
        first_i, first_j = i, j
        a, b = before[i], after[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(before):
                a, i = a * before[i], i + 1
            elif j < len(after):
                b, j = b * after[j], j + 1
            else:
                return None
        if first_i <= dim + len(before) < i:
            while first_i < dim + len(before) and before[first_i] == 1:
                first_i += 1
            while first_j < j - 1 and after[first_j] == 1:
                first_j += 1
            return first_j - len(after) if first_i == dim + len(before) else None
    return None


# Parts of fused projections


def _cut(spread: Spread, node: fx.Node, layout: Split, start: int, end: int) -> tuple[int, Split]:
    """Where a part of the whole begins in this rank's, and its layout."""
    pieces = layout.pieces or (spread.full(node.args[0])[layout.dim],)
    borders = [sum(pieces[:i]) for i in range(len(pieces) + 1)]
    if start not in borders or end not in borders:
        spread.refuse(node, f"it takes {start} to {end} of what is split in {pieces}")
    inside = pieces[borders.index(start) : borders.index(end)]
    inside = inside if len(inside) > 1 else ()
    return start // spread.size, Split(layout.dim, inside)


def _is_cut(spread: Spread, node: fx.Node, layout: Split, dim: int) -> bool:
    rank = len(spread.full(node.args[0]))
    return layout.dim == (dim if dim < 0 else dim - rank)


@_rule(aten.slice.Tensor)
def _slice(spread: Spread, node: fx.Node) -> Any:
    layout = source_layout(spread, node)
    x, dim, start, end = (*node.args, *(None, 0, None, None)[len(node.args) :])[:4]
    step = node.args[4:]
    if layout is None or not _is_cut(spread, node, layout, dim):
        return layout
    if layout.sequence or step:
        return _take_whole(spread, node)
    size = spread.full(x)[layout.dim]
    start, end = slice(start, end).indices(size)[:2]
    begin, inside = _cut(spread, node, layout, start, end)
    node.args = (x, dim, begin, begin + (end - start) // spread.size)
    return inside


def _take_whole(spread: Spread, node: fx.Node) -> None:
    spread.replace_inputs(node, spread.whole)


@_rule(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
def _split(spread: Spread, node: fx.Node) -> Any:
    layout = source_layout(spread, node)
    x, sizes, *rest = node.args
    dim = rest[0] if rest else 0
    count = len(node.meta["val"])
    if layout is None or not _is_cut(spread, node, layout, dim):
        return layout and [layout] * count
    widths = [spread.shape_of(value)[layout.dim] for value in node.meta["val"]]
    parts = [
        _cut(spread, node, layout, sum(widths[:i]), sum(widths[: i + 1]))[1] for i in range(count)
    ]
    if node.target is aten.split.Tensor:
        node.args = (x, sizes // spread.size, *rest)
    elif node.target is aten.split_with_sizes.default:
        node.args = (x, [size // spread.size for size in sizes], *rest)
    return parts
