"""A slice of a stored weight gives back, bit for bit, the slice of what the whole gives back."""

from typing import Any

import pytest
import torch

from graphtune.quantization import NF4, Int4, Int8
from graphtune.quantized_slices import slice_stored


@pytest.mark.parametrize("kind", [NF4(), NF4(32, 16), Int8(), Int4()], ids=str)
@pytest.mark.parametrize(
    ("shape", "dim", "spans"),
    [
        ((96, 128), 0, [(24, 48)]),
        ((96, 128), 1, [(64, 128)]),
        ((320, 256), 0, [(0, 64), (192, 200), (300, 320)]),
        ((40, 1024), 1, [(192, 384), (640, 704)]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits(
    kind: Any, shape: tuple[int, int], dim: int, spans: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = kind.quantize(weight)
    own, cut = slice_stored(kind, shape, dim, spans)
    pieces = dict(zip(stored, cut(*stored.values()), strict=True))
    local = list(shape)
    local[dim] = sum(end - start for start, end in spans)
    found = own.dequantize(pieces, local, dtype)
    whole = kind.dequantize(stored, shape, dtype)
    expected = torch.cat([whole.narrow(dim, a, b - a) for a, b in spans], dim)
    assert torch.equal(found, expected)
    on_meta = cut(*(one.to("meta") for one in stored.values()))
    assert [one.shape for one in on_meta] == [one.shape for one in pieces.values()]


def test_refuses_what_lies_within_a_block() -> None:
    with pytest.raises(ValueError, match="borders of blocks of 64"):
        slice_stored(NF4(), (8, 128), 1, [(0, 32)])
    with pytest.raises(ValueError, match="borders of blocks of 32"):
        slice_stored(Int4(), (8, 128), 1, [(0, 16)])
