"""Slices of weights that are stored in a few bits, cut on the borders of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphtune.quantization import NF4, Format, Int4, Int8

Span = tuple[int, int]


def slice_stored(
    kind: Format, shape: Sequence[int], dim: int, spans: Sequence[Span]
) -> tuple[Format, Callable[..., tuple[Tensor, ...]]]:
    """How some rows, or columns, of a stored weight are stored by themselves.

    The values that come back are, bit for bit, those of the slice of the whole weight.

    Args:
        kind: how the whole weight is stored.
        shape: of the whole weight (rows, columns).
        dim: 0 for rows, 1 for columns.
        spans: first and last (exclusive) of them, of one length or of lengths with a common
            divisor; they are laid one behind the other.

    Returns:
        The format of the slice, and what makes its tensors of the whole's, both in the order of
        `kind.quantize`.

    Raises:
        ValueError: a span does not begin and end on the borders of blocks.
    """
    if isinstance(kind, NF4):
        return _slice_nf4(kind, shape, dim, spans)
    width = kind.group_size if isinstance(kind, Int4) else 1
    if dim == 1:
        _check(spans, width)
    if isinstance(kind, Int4):
        return kind, lambda codes, scales: (
            _take(codes, dim, spans, 2 if dim == 1 else 1),
            _take(scales, dim, spans, width if dim == 1 else 1),
        )
    assert isinstance(kind, Int8)
    return kind, lambda codes, scales: (
        _take(codes, dim, spans, 1),
        scales.clone() if dim == 1 else _take(scales, dim, spans, 1),
    )


def _check(spans: Sequence[Span], width: int) -> None:
    for start, end in spans:
        if start % width or end % width:
            raise ValueError(
                f"{start} to {end} do not begin and end on the borders of blocks of {width}"
            )


def _take(tensor: Tensor, dim: int, spans: Sequence[Span], per: int) -> Tensor:
    """The spans of a tensor that stores `per` elements in one along `dim`."""
    parts = [tensor.narrow(dim, a // per, (b - a) // per) for a, b in spans]
    return torch.cat(parts, dim)


def _slice_nf4(
    kind: NF4, shape: Sequence[int], dim: int, spans: Sequence[Span]
) -> tuple[Format, Callable[..., tuple[Tensor, ...]]]:
    rows, columns = shape
    size = kind.block_size
    if dim == 0:
        runs = [(a * columns, b * columns) for a, b in spans]
    else:
        _check([(0, columns)], size)
        runs = list(spans)  # of each row
    _check(runs, size)
    blocks = [(a // size, b // size) for a, b in runs]
    borders = [border for block in blocks for border in block]
    per_row = columns // size if dim == 1 else 0
    # Scale blocks as large as still have one factor each, in the whole and in the slice.
    group = math.gcd(kind.scale_block_size, per_row, *borders)

    def cut(
        codes: Tensor, scales: Tensor, factors: Tensor, mean: Tensor, levels: Tensor
    ) -> tuple[Tensor, ...]:
        index = torch.cat([torch.arange(a, b, device=codes.device) for a, b in blocks])
        if dim == 1:
            first = torch.arange(rows, device=codes.device) * per_row
            index = (first[:, None] + index).flatten()
        return (
            codes.reshape(-1, size // 2).index_select(0, index).flatten(),
            scales.index_select(0, index),
            factors.index_select(0, index[::group] // kind.scale_block_size),
            mean.clone(),
            levels.clone(),
        )

    return NF4(size, group), cut
