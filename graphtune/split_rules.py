"""What each operator makes of results that are split over ranks (see `graphtune.splitting`).

Each rule sees to it that a node's inputs, and the sizes among its arguments, are this rank's, and
returns the layout of what the node then computes; None where that is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphtune import exchange
from graphtune.split_shapes import SHAPES, rank_of, source_layout
from graphtune.splitting import Partial, Rule, Split, Spread
from graphtune.torch_private import is_fake

aten = torch.ops.aten
RULES: dict[Any, Rule] = dict(SHAPES)


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a node's operator, or None where there is none."""
    return RULES.get(node.target) or (_pointwise if _is_pointwise(node) else None)


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


_POINTWISE = (
    aten.to.dtype,
    aten.to.device,
    aten.type_as.default,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.contiguous.default,
    aten.dropout.default,
    aten.detach.default,
    aten.hardswish.default,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
)
_LINEAR = (  # of sums that are not added up yet: what may be done to each summand
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.to.dtype,
    aten.contiguous.default,
)


def _is_pointwise(node: fx.Node) -> bool:
    return node.target in _POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _pointwise(spread: Spread, node: fx.Node) -> Any:
    sources = [source for source in node.all_input_nodes if is_fake(source.meta["val"])]
    layouts = [spread.layouts.get(source) for source in sources]
    if any(isinstance(layout, Partial) for layout in layouts):
        done = _on_partial(spread, node, layouts)
        if done is not None:
            return done
        spread.replace_inputs(node, spread.summed)
        sources = [source for source in node.all_input_nodes if is_fake(source.meta["val"])]
    splits = {source: spread.layouts[source] for source in sources if source in spread.layouts}
    if not splits:
        return None
    layout = next((one for one in splits.values() if not one.sequence), None)
    layout = layout or next(iter(splits.values()))
    _fit_all(spread, node, layout)
    return layout


def _fit_all(spread: Spread, node: fx.Node, layout: Split, size: int | None = None) -> None:
    """Let a node read of each of its inputs the part that goes with a layout of its result."""
    size = spread.full(node)[layout.dim] if size is None else size

    def fit(source: fx.Node) -> fx.Node:
        if not is_fake(source.meta["val"]):
            return source
        own = spread.layouts.get(source)
        if own == layout:
            return source
        if own is not None and not own.sequence:
            spread.refuse(node, "what it combines is split in two ways")
        shape = spread.full(source)
        if own is None and len(shape) >= -layout.dim and shape[layout.dim] == size != 1:
            if len(layout.pieces) > 1:
                spread.refuse(node, "it combines a fused projection with something whole")
            return spread.part(source, layout.dim)
        return spread.entered(source)

    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), fit)


def _on_partial(spread: Spread, node: fx.Node, layouts: list[Any]) -> Any:
    """What an operator makes of sums that are not added up, or None where it needs them so."""
    sources = [source for source in node.all_input_nodes if is_fake(source.meta["val"])]
    partial = [one for one in layouts if isinstance(one, Partial)]
    if (
        node.target is aten.sub.Tensor
        and len(partial) == 1
        and partial[0].biases == (node.args[1],)
    ):
        node.target, node.args = aten.alias.default, node.args[:1]  # it never got its bias
        return Partial()
    adapts = "adapter" in node.meta.get("custom", {})
    if not adapts and any(len(source.users) > 1 for source in sources if source in spread.layouts):
        return None  # others need the sum, so it is there
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and len(partial) == len(layouts) == 2:
        if node.target is aten.sub.Tensor and partial[1].biases:
            return None
        return Partial(partial[0].biases + partial[1].biases)
    if node.target in _LINEAR and len(partial) == 1:
        if node.target is aten.to.dtype:
            return partial[0]
        others = [s for s, layout in zip(sources, layouts, strict=True) if layout is None]
        first = node.args[0]
        if partial[0].biases or len(others) + 1 != len(layouts) or first not in sources:
            return None
        if node.target is aten.div.Tensor and not isinstance(spread.layouts.get(first), Partial):
            return None
        node.args = tuple(spread.entered(a) if a in others else a for a in node.args)
        return Partial()
    return None


# Products


@_rule(aten.linear.default)
def _linear(spread: Spread, node: fx.Node) -> Any:
    x, weight, *rest = node.args
    x, weight, bias, layout = _product(spread, node, x, weight, rest[0] if rest else None, -2)
    node.args = (x, weight) if bias is None else (x, weight, bias)
    return layout


@_rule(aten.addmm.default)
def _addmm(spread: Spread, node: fx.Node) -> Any:
    bias, x, weight = node.args
    x, weight, bias, layout = _product(spread, node, x, weight, bias, -1)
    if bias is None:
        node.target = aten.mm.default
    node.args = (x, weight) if bias is None else (bias, x, weight)
    return layout


def _product(
    spread: Spread, node: fx.Node, x: Any, weight: Any, bias: Any, out: int
) -> tuple[Any, Any, Any, Any]:
    """Input, weight and bias of this rank, and the result's layout.

    Args:
        out: the dimension of the weight, from the end, that counts outputs.
    """
    own = spread.layouts.get(weight)
    if isinstance(spread.layouts.get(x), Partial) and (own is not None or bias is not None):
        x = spread.summed(x)
    of_x = spread.layouts.get(x)
    if own is None:
        if isinstance(of_x, Split) and of_x.dim == -1:
            spread.refuse(node, "its input is split and its weight is not")
        bias = bias if bias is None else spread.entered(bias)
        return x, spread.entered(weight), bias, of_x
    if own.dim == out:
        if isinstance(of_x, Split) and not of_x.sequence:
            spread.refuse(node, "its input is split, and its outputs are")
        if bias is not None and bias not in spread.layouts:
            bias = spread.part(bias, -1)
        return spread.entered(x), weight, bias, Split(-1, own.pieces)
    if of_x is None and not own.pieces:
        x, of_x = spread.part(x, -1), Split(-1)
    if of_x != Split(-1, own.pieces):
        spread.refuse(node, "its input is not split as its weight is")
    return x, weight, None, Partial(() if bias is None else (bias,))


@_rule(aten.matmul.default, aten.bmm.default)
def _matmul(spread: Spread, node: fx.Node) -> Any:
    spread.replace_inputs(node, spread.summed)
    a, b = node.args
    of_a, of_b = spread.layouts.get(a), spread.layouts.get(b)
    if of_a is not None and of_b is None and len(spread.full(b)) == 2 and of_a.dim != -1:
        node.args = (a, spread.entered(b))
        return of_a
    if of_a is None or of_a != of_b or of_a.dim > -3:
        spread.refuse(node, "its two factors are not split in the same way")
    return of_a


@_rule(aten.scaled_dot_product_attention.default)
def _attention(spread: Spread, node: fx.Node) -> Any:
    spread.replace_inputs(node, spread.summed)
    q, k, v, *rest = node.args
    if any(spread.layouts.get(one) != Split(-3) for one in (q, k, v)):
        spread.refuse(node, "query, key and value are not all split by heads")
    heads = spread.full(q)[-3]

    def fit(mask: fx.Node) -> fx.Node:
        shape = spread.full(mask) if is_fake(mask.meta["val"]) else ()
        return spread.part(mask, -3) if len(shape) > 2 and shape[-3] == heads != 1 else mask

    node.args = (q, k, v, *fx.node.map_arg(tuple(rest), fit))
    node.kwargs = fx.node.map_arg(node.kwargs, fit)
    return Split(-3)


# Reductions


def _dims(dims: Any, rank: int) -> set[int]:
    """Dimensions counted from the end; none given means all."""
    given = [dims] if isinstance(dims, int) else dims or range(rank)
    return {dim if dim < 0 else dim - rank for dim in given}


def _reduction(place: int, keep_place: int) -> Rule:
    def reduce(spread: Spread, node: fx.Node) -> Any:
        layout = source_layout(spread, node)
        if layout is None:
            return None
        dims = _dims(node.args[place], len(spread.full(node.args[0])))
        if layout.dim in dims:
            spread.refuse(node, f"{node.target} goes over all of what is split")
        keep = len(node.args) > keep_place and node.args[keep_place]
        gone = 0 if keep else sum(dim > layout.dim for dim in dims)
        return Split(layout.dim + gone, layout.pieces, layout.sequence)

    return reduce


RULES |= dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default), _reduction(1, 2))


@_rule(aten.linalg_vector_norm.default)
def _vector_norm(spread: Spread, node: fx.Node) -> Any:
    layout = source_layout(spread, node)
    x, order, dims, *rest = node.args
    if layout is None or layout.dim not in _dims(dims, len(spread.full(x))):
        return _reduction(2, 3)(spread, node)
    if order != 2 or rest or len(layout.pieces) > 1 or layout.sequence:
        spread.refuse(node, "it takes a norm over all of what is split")
    with spread.edit.after(node):
        square = spread.edit.call(aten.square.default, node)
        total = spread.edit.call(exchange.all_reduce, square, spread.group)
        norm = spread.edit.call(aten.sqrt.default, total)
    node.replace_all_uses_with(norm, delete_user_cb=lambda user: user is not square)
    return None


def _along(dim_of: Callable[[fx.Node], set[int]]) -> Rule:
    """Operators that keep the shape, and mix what lies along some dimensions."""

    def mix(spread: Spread, node: fx.Node) -> Any:
        layout = source_layout(spread, node)
        if layout is None:
            return None
        if layout.dim in dim_of(node):
            spread.refuse(node, f"{node.target} goes over all of what is split")
        rest = fx.node.map_arg(node.args[1:], spread.entered)
        node.args = (node.args[0], *rest)
        return layout

    return mix


RULES |= dict.fromkeys(
    (aten.softmax.int, aten.log_softmax.int),
    _along(lambda node: _dims(node.args[1], rank_of(node))),
)
RULES |= dict.fromkeys(
    (aten.layer_norm.default, aten.rms_norm.default),
    _along(lambda node: set(range(-len(node.args[1]), 0))),
)


@_rule(aten.cat.default)
def _cat(spread: Spread, node: fx.Node) -> Any:
    spread.replace_inputs(node, spread.summed)
    layouts = [spread.layouts[one] for one in node.args[0] if one in spread.layouts]
    if not layouts:
        return None
    rank = len(spread.full(node))
    dim = node.args[1] if len(node.args) > 1 else 0
    if layouts[0].dim == (dim if dim < 0 else dim - rank):
        spread.refuse(node, "it joins what is split")
    _fit_all(spread, node, layouts[0])
    return layouts[0]
