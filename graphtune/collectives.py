"""The operators by which the ranks of a run exchange weights and gradients within a graph.

Each is a composite of torch's functional collectives with a backward pass of its own: autograd,
fake tensors and `torch.compile` see through it, and the tags of its node in a graph hold for each
piece. One call takes all tensors of a layer, laid one behind the other, so that there is one
collective for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphtune.transient import remember

_c10d = torch.ops._c10d_functional
_library = torch.library.Library("graphtune", "FRAGMENT")


def _all_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_gather_into_tensor(x, ranks, group))


def _all_reduce(x: Tensor, groups: Iterable[str]) -> Tensor:
    for group in groups:
        x = _c10d.wait_tensor(_c10d.all_reduce(x, "sum", group))
    return x


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (ranks, n_i) side by side; a single one as it is."""
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


def _gather(
    shards: Sequence[Tensor],
    dims: Sequence[int],
    sizes: Sequence[int],
    gather_dtype: torch.dtype | None,
    dtype: torch.dtype | None,
    ranks: int,
    group: str,
) -> list[Tensor]:
    """The forward pass of `unshard`."""
    sent = [shard if gather_dtype is None else shard.to(gather_dtype) for shard in shards]
    as_bytes = len({one.dtype for one in sent}) > 1
    rows = [one.reshape(1, -1) for one in sent]
    rows = [row.view(torch.uint8) for row in rows] if as_bytes else rows
    everything = _all_gather(_join(rows), ranks, group)
    pieces = everything.split([row.shape[1] for row in rows], 1)
    results = []
    for piece, one, dim, size in zip(pieces, sent, dims, sizes, strict=True):
        if as_bytes:
            piece = piece.contiguous().view(one.dtype)
        padded = piece.unflatten(1, one.shape).movedim(0, dim).flatten(dim, dim + 1)
        whole = padded.narrow(dim, 0, size).contiguous()
        results.append(whole if dtype is None else whole.to(dtype))
    return results


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *shards: Tensor) -> tuple[Tensor, ...]:
        dims, sizes, gather_dtype, dtype, _, ranks, group, _ = options
        ctx.options = options
        ctx.shards = [(shard.shape, shard.dtype) for shard in shards]
        return tuple(_gather(shards, dims, sizes, gather_dtype, dtype, ranks, group))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dims, sizes, gather_dtype, _, reduce_dtype, ranks, group, replicas = ctx.options
        sent = []
        for gradient, dim, size, (shape, _) in zip(gradients, dims, sizes, ctx.shards, strict=True):
            missing = ranks * shape[dim] - size
            if missing:
                padding = (0, 0) * (gradient.dim() - 1 - dim) + (0, missing)
                gradient = functional.pad(gradient, padding)
            parts = gradient.unflatten(dim, (ranks, shape[dim])).movedim(dim, 0)
            dtype = reduce_dtype or gather_dtype or gradient.dtype
            sent.append(parts.reshape(ranks, -1).to(dtype))
        summed = _c10d.reduce_scatter_tensor(_join(sent).contiguous(), "sum", ranks, group)
        summed = _all_reduce(_c10d.wait_tensor(summed), replicas)
        pieces = summed.split([one.shape[1] for one in sent], 1)
        return None, *(
            piece.reshape(shape).to(dtype)
            for piece, (shape, dtype) in zip(pieces, ctx.shards, strict=True)
        )


def _unshard(
    shards: list[Tensor],
    dims: list[int],
    sizes: list[int],
    gather_dtype: torch.dtype | None,
    dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    ranks: int,
    group: str,
    replicas: list[str],
    unit: str,
) -> list[Tensor]:
    forward = (shards, dims, sizes, gather_dtype, dtype, ranks, group)
    if any(shard.requires_grad for shard in shards):
        options = (dims, sizes, gather_dtype, dtype, reduce_dtype, ranks, group, replicas)
        wholes = list(_Unshard.apply(options, *shards))
    else:
        wholes = _gather(*forward)
    if unit:
        remember(wholes, _gather, forward, unit)
    return wholes


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, reduce_dtype: torch.dtype | None, groups: list[str], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.reduce_dtype, ctx.groups = reduce_dtype, groups
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sent = [one.reshape(1, -1).to(ctx.reduce_dtype or one.dtype) for one in gradients]
        summed = _all_reduce(_join(sent).contiguous(), ctx.groups)
        pieces = summed.split([one.shape[1] for one in sent], 1)
        return (
            None,
            None,
            *(
                piece.reshape(one.shape).to(one.dtype)
                for piece, one in zip(pieces, gradients, strict=True)
            ),
        )


def _sum_gradients(
    tensors: list[Tensor], reduce_dtype: torch.dtype | None, groups: list[str]
) -> list[Tensor]:
    return list(_SumGradients.apply(reduce_dtype, groups, *tensors))


def _define(schema: str, composite: Any) -> Any:
    name = _library.define(schema)
    _library.impl(name, composite, "CompositeImplicitAutograd")
    return getattr(torch.ops.graphtune, name.split("::")[-1]).default


unshard = _define(
    "unshard(Tensor[] shards, int[] dims, int[] sizes, ScalarType? gather_dtype, "
    "ScalarType? dtype, ScalarType? reduce_dtype, int ranks, str group, str[] replicas, str unit) "
    "-> Tensor[]",
    _unshard,
)
"""Whole tensors from each rank's shard: one all-gather; backward one reduce-scatter (sum).

Args:
    shards: this rank's part of each, padded (see `graphtune.distributed.Part`); of any dtypes
        where none needs a gradient, else of one.
    dims: the dimension that each is divided along.
    sizes: of that dimension in the whole tensor.
    gather_dtype: shards are cast to it first; None: as they are.
    dtype: of the result; None: as gathered.
    reduce_dtype: in which gradients are summed; None: as gathered.
    ranks: how many there are.
    group: name of the process group they make up.
    replicas: of groups over which gradients are summed once they are scattered.
    unit: "" keeps what is gathered for the backward pass; else the name of what is gathered again
        together there, see `graphtune.transient`. (In a compiled step the node's tags say so.)
"""

sum_gradients = _define(
    "sum_gradients(Tensor[] tensors, ScalarType? reduce_dtype, str[] groups) -> Tensor[]",
    _sum_gradients,
)
"""The tensors themselves; backward their gradients, summed over the groups by one all-reduce each.

Args:
    tensors: the same on all ranks.
    reduce_dtype: in which gradients are summed; None: their own.
    groups: names of process groups.
"""
