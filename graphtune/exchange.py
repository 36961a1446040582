"""How ranks exchange parts of activations in a graph, each way with the backward that it needs.

Every rank of a tensor parallel group computes the whole loss, so the gradient of a tensor that all
have in full is full on each (Shoeybi et al., Megatron-LM, arXiv:1909.08053, whose f is
`sum_gradient` here and whose g is `all_reduce`); the others are those of Korthikanti et al.
(arXiv:2205.05198). Where a dimension does not divide by the ranks, its parts are as long as the
first one, the last being padded with zeros.

The operators are composites of torch's functional collectives: autograd, fake tensors and
`torch.compile` see through them, and inductor orders and joins the collectives as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphtune.torch_private import group_rank, group_size

_library = torch.library.Library("graphtune", "FRAGMENT")
_c10d = torch.ops._c10d_functional


def _define(schema: str, composite: Callable[..., Tensor]) -> Any:
    name = _library.define(schema)
    _library.impl(name, composite, "CompositeImplicitAutograd")
    return getattr(torch.ops.graphtune, name.split("::")[-1]).default


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), "sum", group))


def _all_gather(x: Tensor, dim: int, length: int, group: str) -> Tensor:
    """The parts of all ranks one after the other along `dim`, cut to `length`."""
    first = x.movedim(dim, 0).contiguous()
    whole = _c10d.wait_tensor(_c10d.all_gather_into_tensor(first, group_size(group), group))
    return whole.narrow(0, 0, length).movedim(0, dim).contiguous()


def _part_length(length: int, group: str) -> int:
    size = group_size(group)
    return (length + size - 1) // size


def _padded(x: Tensor, group: str) -> Tensor:
    """A tensor whose first dimension is as long as the parts of all ranks together."""
    missing = _part_length(x.shape[0], group) * group_size(group) - x.shape[0]
    if isinstance(missing, int) and missing == 0:
        return x
    return torch.cat([x, x.new_zeros((missing, *x.shape[1:]))])


def _reduce_scatter(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's part along `dim` of the sum of all ranks' tensors."""
    first = _padded(x.movedim(dim, 0), group).contiguous()
    part = _c10d.wait_tensor(_c10d.reduce_scatter_tensor(first, "sum", group_size(group), group))
    return part.movedim(0, dim).contiguous()


def _share(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's part along `dim`."""
    part = _part_length(x.shape[dim], group)
    first = _padded(x.movedim(dim, 0), group)
    own = first.narrow(0, group_rank(group) * part, part).movedim(0, dim)
    return own.clone(memory_format=torch.contiguous_format)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, length: int, summed: bool, group: str) -> Tensor:
        ctx.options = dim, summed, group
        return _all_gather(x, dim, length, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        dim, summed, group = ctx.options
        back = _reduce_scatter if summed else _share
        return back(grads[0], dim, group), None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str) -> Tensor:
        ctx.options = dim, x.shape[dim], group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dim, length, group = ctx.options
        return _all_gather(grads[0], dim, length, group), None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str) -> Tensor:
        ctx.options = dim, x.shape[dim], group
        return _share(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dim, length, group = ctx.options
        return _all_gather(grads[0], dim, length, group), None, None


sum_gradient = _define("sum_gradient(Tensor x, str group) -> Tensor", _SumGradient.apply)
"""The tensor itself; its gradient is summed over the ranks (Megatron's f)."""

all_reduce = _define("all_reduce(Tensor x, str group) -> Tensor", _AllReduce.apply)
"""The sum over the ranks; its gradient is handed on as it is (Megatron's g)."""

all_gather = _define(
    "all_gather(Tensor x, int dim, SymInt length, bool summed, str group) -> Tensor",
    _AllGather.apply,
)
"""All ranks' parts along a dimension, `length` long. Backward: a reduce-scatter if `summed`, else,
where all ranks have the same gradient, this rank's part of it."""

reduce_scatter = _define(
    "reduce_scatter(Tensor x, int dim, str group) -> Tensor", _ReduceScatter.apply
)
"""This rank's part of the sum over the ranks; backward: an all-gather."""

share = _define("share(Tensor x, int dim, str group) -> Tensor", _Share.apply)
"""This rank's part of what all have in full; backward: an all-gather."""


def _maximum(x: Tensor, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), "max", group))


maximum = _define("maximum(Tensor x, str group) -> Tensor", _maximum)
"""The largest of all ranks' values; without a gradient."""


# A row's tokens over the ranks: of twice as many pieces as ranks, rank r has the piece r and, from
# the end, the piece r again. A causal mask then leaves as much to each (head and tail).


def _piece_length(length: int, group: str) -> int:
    pieces = 2 * group_size(group)
    return (length + pieces - 1) // pieces


def _share_balanced(x: Tensor, dim: int, fill: int, group: str) -> Tensor:
    ranks, rank = group_size(group), group_rank(group)
    piece = _piece_length(x.shape[dim], group)
    first = x.movedim(dim, 0)
    missing = 2 * ranks * piece - first.shape[0]
    padded = torch.cat([first, first.new_full((missing, *first.shape[1:]), fill)])
    head = padded.narrow(0, rank * piece, piece)
    tail = padded.narrow(0, (2 * ranks - 1 - rank) * piece, piece)
    return torch.cat([head, tail]).movedim(0, dim).contiguous()


def _gather_balanced(x: Tensor, dim: int, length: int, group: str) -> Tensor:
    ranks = group_size(group)
    piece = _piece_length(length, group)
    first = x.movedim(dim, 0).contiguous()
    every = _c10d.wait_tensor(_c10d.all_gather_into_tensor(first, ranks, group))
    pieces = every.unflatten(0, (ranks, 2, piece))
    heads, tails = pieces[:, 0], pieces[:, 1].flip(0)
    ordered = torch.cat([heads, tails]).flatten(0, 1).narrow(0, 0, length)
    return ordered.movedim(0, dim).contiguous()


class _GatherBalanced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, length: int, group: str) -> Tensor:
        ctx.options = dim, group
        return _gather_balanced(x, dim, length, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        dim, group = ctx.options
        ranks = group_size(group)
        first = grads[0].movedim(dim, 0)
        piece = _piece_length(first.shape[0], group)
        missing = 2 * ranks * piece - first.shape[0]
        padded = torch.cat([first, first.new_zeros((missing, *first.shape[1:]))])
        pieces = padded.unflatten(0, (2, ranks, piece))
        order = torch.stack([pieces[0], pieces[1].flip(0)], 1).flatten(0, 2)
        part = _c10d.reduce_scatter_tensor(order.contiguous(), "sum", ranks, group)
        return _c10d.wait_tensor(part).movedim(0, dim), None, None, None


share_balanced = _define(
    "share_balanced(Tensor x, int dim, int fill, str group) -> Tensor", _share_balanced
)
"""This rank's tokens of what all ranks have in full: its first and its last piece of the dimension,
which is filled up to the multiple of twice the number of ranks with `fill`. No gradient is summed:
it is for inputs and masks."""

gather_balanced = _define(
    "gather_balanced(Tensor x, int dim, SymInt length, str group) -> Tensor", _GatherBalanced.apply
)
"""All tokens, in their order, `length` of them, of what `share_balanced` divided; backward: the sum
of all ranks' gradients for this rank's tokens, by a reduce-scatter."""
