"""Formats that keep a frozen weight in 4 or 8 bits, and the operators that give it back.

Weights are rounded once and do not train any more: NF4 with double quantization is from QLoRA
(Dettmers et al., arXiv:2305.14314), the symmetric integer formats are those of torchao's
weight-only configurations. Codes, scales and values are torchao's, bit for bit, for float32 and
bfloat16 weights. float16 is treated as float32, because the arithmetic on scales overflows in it.

The operators are composites of plain aten ones. Autograd, fake tensors, `torch.export` and
`torch.compile` therefore see through them: a compiler fuses the pieces into one kernel, and what a
graph's metadata says of the call holds for each piece.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from graphtune.transient import remember

_library = torch.library.Library("graphtune", "FRAGMENT")


def _define(schema: str, composite: Callable[..., Tensor]) -> Any:
    def operator(*args: Any) -> Tensor:
        weight = composite(*args)
        remember([weight], lambda *given: [composite(*given)], args, unit="")
        return weight

    name = _library.define(schema)
    _library.impl(name, operator, "CompositeImplicitAutograd")
    return getattr(torch.ops.graphtune, name.split("::")[-1]).default


class Format(ABC):
    """How a weight is stored. Subclasses are frozen dataclasses of options.

    Class variables:
        name: what configs call it.
        op: the operator that gives the weight back.
    """

    name: ClassVar[str]
    op: ClassVar[Any]

    @abstractmethod
    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError, saying what would be right, if no weight of that shape fits."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors to store, by the suffix of their names.

        Args:
            weight: of any number of dimensions, float32, bfloat16 or float16; on the meta device
                too, where the result has shapes only.

        Raises:
            ValueError: as `check`.
        """

    @abstractmethod
    def arguments(
        self, tensors: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype
    ) -> tuple[Any, ...]:
        """The arguments of `op`.

        Args:
            tensors: what `quantize` returned, or nodes of a graph that stand for it.
            shape: of the weight.
            dtype: of the weight. Another one than was quantized gives other roundings.
        """

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """The weight, rounded: `shape`, `dtype`; no gradient flows to `tensors`."""
        return self.op(*self.arguments(tensors, shape, dtype))


def _working(weight: Tensor) -> Tensor:
    """The weight in the dtype in which its scales are computed."""
    return weight.detach() if weight.dtype == torch.bfloat16 else weight.detach().float()


def _absmax(groups: Tensor) -> Tensor:
    """Largest magnitude along the last dimension, without a copy of what may be large."""
    return torch.maximum(groups.amax(-1), -groups.amin(-1))


def _pack(codes: Tensor) -> Tensor:
    """Two codes below 16 in each byte, the first in the high bits: (..., n) -> (..., n / 2)."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def _unpack(packed: Tensor) -> Tensor:
    """The codes, uint8: (..., n / 2) -> (..., n)."""
    # Shifting by (4, 0) interleaves by index arithmetic; a stack of both halves would compile to
    # a branch for each element.
    shifts = torch.arange(4, -1, -4, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 15).flatten(-2)


# NF4: quantiles of the normal distribution, as rounded in torchao.
NF4_LEVELS = (
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
)
_CHUNK = 2**20  # elements; bounds the memory that rounding to levels takes
_SMALLEST = 1e-30  # below it, 256 / (2 * absmax) may overflow


def _round_to_bfloat16(x: Tensor) -> Tensor:
    """float32 values rounded to bfloat16's precision.

    A cast there and back would do, but a compiler removes it; the bits it must compute.
    """
    return (x.to(torch.bfloat16).view(torch.int16).int() << 16).view(torch.float32)


def _dequantize_nf4(
    codes: Tensor,
    scales: Tensor,
    scale_factors: Tensor,
    scale_mean: Tensor,
    levels: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    scale_block_size: int,
) -> Tensor:
    blocks = scales.numel()
    factors = scale_factors.unsqueeze(-1).expand(-1, scale_block_size).reshape(-1)[:blocks]
    if dtype == torch.bfloat16:
        block_scales = _round_to_bfloat16(_round_to_bfloat16(scales / factors) + scale_mean)
    else:
        block_scales = scales / factors + scale_mean
    values = levels[_unpack(codes.reshape(blocks, -1)).int()] * block_scales.unsqueeze(-1)
    return values.to(dtype).reshape(shape).detach()


@dataclass(frozen=True)
class NF4(Format):
    """4-bit normal floats in blocks, whose scales are quantized to 8 bits themselves.

    A weight of n elements, flattened, is stored as `nf4` uint8 (n / 2), two codes a byte;
    `nf4_scales` int8 (blocks); `nf4_scale_factors` float32 (scale blocks) and `nf4_scale_mean`
    float32 (), so that a block's scale is `scales / factor + mean`; and `nf4_levels` float32 (16),
    the values that codes stand for. That is 4.13 bits per element with the default options.

    Three things differ from torchao: the last scale block may be a shorter one; a block of zeros
    stays zero; and scales that are all alike get a finite factor, with the same values.

    Attributes:
        block_size: elements with a common scale; even.
        scale_block_size: scales with a common factor.
    """

    block_size: int = 64
    scale_block_size: int = 256

    name: ClassVar[str] = "nf4"
    op: ClassVar[Any] = _define(
        "dequantize_nf4(Tensor codes, Tensor scales, Tensor scale_factors, Tensor scale_mean, "
        "Tensor levels, int[] shape, ScalarType dtype, int scale_block_size) -> Tensor",
        _dequantize_nf4,
    )

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size % 2:
            raise ValueError(f"block_size={self.block_size} must be even and at least 2")
        if self.scale_block_size < 1:
            raise ValueError(f"scale_block_size={self.scale_block_size} must be at least 1")

    def check(self, shape: Sequence[int]) -> None:
        count = torch.Size(shape).numel()
        if count == 0 or count % self.block_size:
            raise ValueError(
                f"the number of elements of a weight of shape {tuple(shape)}, {count}, must be a "
                f"multiple of the block size, {self.block_size}"
            )

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        self.check(weight.shape)
        blocks = _working(weight).reshape(-1, self.block_size)
        absmax = _absmax(blocks)
        mean = absmax.mean()
        codes, factors = self._quantize_scales(absmax - mean)
        levels = torch.tensor(NF4_LEVELS).to(blocks.dtype).float()
        return {
            "nf4": _nearest(blocks, absmax, levels),
            "nf4_scales": codes,
            "nf4_scale_factors": factors.float(),
            "nf4_scale_mean": mean.float(),
            "nf4_levels": levels.to(weight.device),
        }

    def _quantize_scales(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Double quantization: int8 codes (blocks), and a factor for each scale block."""
        missing = -scales.numel() % self.scale_block_size
        padded = functional.pad(scales, (0, missing)).reshape(-1, self.scale_block_size)
        factors = 256 / (2 * _absmax(padded).clamp(min=_SMALLEST))
        codes = (padded * factors.unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8)
        return codes.flatten()[: scales.numel()].clone(), factors

    def arguments(
        self, tensors: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype
    ) -> tuple[Any, ...]:
        suffixes = ("nf4", "nf4_scales", "nf4_scale_factors", "nf4_scale_mean", "nf4_levels")
        packed = (tensors[suffix] for suffix in suffixes)
        return (*packed, list(shape), dtype, self.scale_block_size)


def _nearest(blocks: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """Packed codes of the levels nearest to blocks / absmax; of two as near, the lower one.

    Args:
        blocks: (blocks, block size).
        absmax: (blocks), its dtype.
        levels: float32 (16), on the CPU.

    Returns:
        uint8 (blocks * block size / 2).
    """
    exact = levels.double()
    middles = (exact[1:] + exact[:-1]) / 2
    bounds = middles.float()
    # A value equal to a bound is rounded down to the lower level, so bounds are rounded down too.
    above = bounds.double() > middles
    bounds = torch.where(above, bounds.nextafter(torch.tensor(-2.0)), bounds).to(blocks.device)
    packed = torch.empty(
        (blocks.shape[0], blocks.shape[1] // 2), dtype=torch.uint8, device=blocks.device
    )
    # Chunks bound the memory of float32 copies, which shapes alone do not take.
    rows = blocks.shape[0] if blocks.is_meta else max(1, _CHUNK // blocks.shape[1])
    divisors = absmax.masked_fill(absmax == 0, 1).unsqueeze(-1)
    for start in range(0, blocks.shape[0], rows):
        part = slice(start, start + rows)
        scaled = (blocks[part] / divisors[part]).float()
        codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
        packed[part] = _pack(codes)
    return packed.flatten()


def _dequantize_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scales).to(dtype).detach()


@dataclass(frozen=True)
class Int8(Format):
    """Symmetric 8-bit integers with a scale for each row of the last dimension.

    A weight (..., n) is stored as `int8` int8 (..., n) and `int8_scales` float32 (..., 1), the
    layout of torchao's `Int8WeightOnlyConfig`.
    """

    name: ClassVar[str] = "int8"
    op: ClassVar[Any] = _define(
        "dequantize_int8(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor",
        _dequantize_int8,
    )

    def check(self, shape: Sequence[int]) -> None:
        if torch.Size(shape).numel() == 0 or len(shape) == 0:
            raise ValueError(f"a weight of shape {tuple(shape)} must have rows with elements")

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        self.check(weight.shape)
        values = _working(weight)
        scales = _absmax(values) / 127.5  # half of the range, 255; 127 is clamped to
        scales = scales.clamp(min=torch.finfo(torch.float32).eps).float().unsqueeze(-1)
        codes = (values * (1.0 / scales)).round().clamp(-128, 127)
        return {"int8": codes.to(torch.int8), "int8_scales": scales}

    def arguments(
        self, tensors: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype
    ) -> tuple[Any, ...]:
        return tensors["int8"], tensors["int8_scales"], dtype


def _dequantize_int4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    groups = _unpack(codes.reshape(*scales.shape, -1)).float() - 8
    return (groups * scales.float().unsqueeze(-1)).to(dtype).flatten(-2).detach()


@dataclass(frozen=True)
class Int4(Format):
    """Symmetric 4-bit integers with a scale for each group along the last dimension.

    A weight (..., n) is stored as `int4` uint8 (..., n / 2), two codes a byte, each 8 more than
    the integer from -8 to 7 that it stands for; and `int4_scales` (..., n / group size), bfloat16
    for a bfloat16 weight, else float32. Integers and scales are those of torchao's
    `IntxWeightOnlyConfig`.

    Attributes:
        group_size: elements with a common scale; even.
    """

    group_size: int = 32

    name: ClassVar[str] = "int4"
    op: ClassVar[Any] = _define(
        "dequantize_int4(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor",
        _dequantize_int4,
    )

    def __post_init__(self) -> None:
        if self.group_size < 2 or self.group_size % 2:
            raise ValueError(f"group_size={self.group_size} must be even and at least 2")

    def check(self, shape: Sequence[int]) -> None:
        if torch.Size(shape).numel() == 0 or not shape or shape[-1] % self.group_size:
            raise ValueError(
                f"the last dimension of a weight of shape {tuple(shape)} must be a multiple of "
                f"the group size, {self.group_size}"
            )

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        self.check(weight.shape)
        groups = _working(weight).unflatten(-1, (-1, self.group_size))
        smallest = torch.finfo(groups.dtype).smallest_normal
        scales = (_absmax(groups) / 7.5).clamp(min=smallest)
        codes = (groups * (1.0 / scales).unsqueeze(-1)).round().clamp(-8, 7) + 8
        return {"int4": _pack(codes.to(torch.uint8).flatten(-2)), "int4_scales": scales}

    def arguments(
        self, tensors: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype
    ) -> tuple[Any, ...]:
        return tensors["int4"], tensors["int4_scales"], dtype


FORMATS: dict[str, type[Format]] = {kind.name: kind for kind in (NF4, Int8, Int4)}
