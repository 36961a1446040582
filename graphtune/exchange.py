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
    return whole.narrow(0, 0, length).movedim(0, dim)


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
    return part.movedim(0, dim)


def _share(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's part along `dim`."""
    part = _part_length(x.shape[dim], group)
    first = _padded(x.movedim(dim, 0), group)
    return first.narrow(0, group_rank(group) * part, part).movedim(0, dim)


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
        return _share(x, dim, group).clone()

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
