"""Causal attention within documents that share rows, as an operator.

With a mask torch's attention on a CPU computes all of (seq, seq). Here its kernel is called for
each document, on a slice of a row: nothing is copied, and no mask is read. Forward and backward
pass are one opaque operator each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphtune.torch_private import causal_attention_on_cpu, causal_attention_on_cpu_backward


def _blocks(documents: Tensor, query: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each document; of whole rows, one after the other, all together."""
    length = query.shape[2]
    whole: list[int] = []
    for start, end in documents.tolist():
        row, column = divmod(start, length)
        if end - start > length - column:
            raise ValueError(f"document from {start} to {end} does not lie in a row of {length}")
        if whole and (end - start < length or row != whole[-1] + 1):
            yield slice(whole[0], whole[-1] + 1), slice(0, length)
            whole = []
        if end - start == length:
            whole.append(row)
        elif start < end:
            yield slice(row, row + 1), slice(column, column + end - start)
    if whole:
        yield slice(whole[0], whole[-1] + 1), slice(0, length)


def _is_each_row(documents: Tensor, query: Tensor) -> bool:
    """Whether all rows are a document each."""
    everything = slice(0, query.shape[0]), slice(0, query.shape[2])
    return list(_blocks(documents, query)) == [everything]


def _is_covered(documents: Tensor, query: Tensor) -> bool:
    """Whether each token is in a document."""
    return int((documents[:, 1] - documents[:, 0]).sum()) == query.shape[0] * query.shape[2]


def _laid_out(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (batch, heads, seq, ...), which torch's kernels lay out by tokens."""
    batch, heads, length, *channels = like.shape
    return like.new_empty(batch, length, heads, *channels, dtype=dtype).transpose(1, 2)


def _results(query: Tensor) -> tuple[Tensor, Tensor]:
    summed = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _laid_out(query), _laid_out(query[..., 0], summed)


def _gradients(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _laid_out(query), _laid_out(key), _laid_out(key)


@torch.library.custom_op("graphtune::document_attention", mutates_args=(), device_types="cpu")
def _attend(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    if _is_each_row(documents, query):
        return causal_attention_on_cpu(query, key, value, scale)
    out, logsumexp = _results(query)
    if not _is_covered(documents, query):
        out.copy_(value.repeat_interleave(query.shape[1] // key.shape[1], 1))  # each sees itself
        logsumexp.zero_()
    for rows, columns in _blocks(documents, query):
        place = (rows, slice(None), columns)
        parts = query[place], key[place], value[place]
        out[place], logsumexp[place] = causal_attention_on_cpu(*parts, scale)
    return out, logsumexp


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _results(query)


@torch.library.custom_op(
    "graphtune::document_attention_backward", mutates_args=(), device_types="cpu"
)
def _attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    documents: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if _is_each_row(documents, query):
        return causal_attention_on_cpu_backward(gradient, query, key, value, out, logsumexp, scale)
    found = _gradients(query, key)
    if not _is_covered(documents, query):
        for one in found[:2]:
            one.zero_()
        torch.sum(gradient.unflatten(1, (key.shape[1], -1)), 2, out=found[2])
    for rows, columns in _blocks(documents, query):
        place = (rows, slice(None), columns)
        given = gradient[place], query[place], key[place], value[place]
        pieces = causal_attention_on_cpu_backward(*given, out[place], logsumexp[place], scale)
        for one, piece in zip(found, pieces, strict=True):
            one[place] = piece
    return found


@_attend_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    documents: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(query, key)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    query, key, value, documents, out, logsumexp = ctx.saved_tensors
    call = torch.ops.graphtune.document_attention_backward
    found = call(gradient, query, key, value, out, logsumexp, documents, ctx.scale)
    return *found, None, None


_attend.register_autograd(_differentiate, setup_context=_save)

document_attention = torch.ops.graphtune.document_attention.default
"""(query, key, value, documents, scale) -> (out, logsumexp).

Args:
    query: (batch, heads, seq, channels).
    key, value: the same, or with fewer heads, each of which as many queries' heads share.
    documents: int64 (documents, 2) on the CPU, see `graphtune.masks.find_documents`.
    scale: of the products.

Returns:
    `out` as `query`: attention of each token to what is in its document up to itself, and of what
    is in none to itself. `logsumexp` (batch, heads, seq), float32 or float64, is for the backward
    pass alone. Only on a CPU: other devices have no such kernel.
"""
