"""Fake quantization: what integers would hold, computed in floating point, with gradients.

A value is rounded to the nearest of the numbers that its integer type can stand for. Its gradient
passes the rounding as if there were none (Bengio et al., arXiv:1308.3432), and is zero where the
value was clipped; scales and zero points get none. Values and gradients are those of torchao's
`IntxFakeQuantizer`, bit for bit.

torchao rounds in an `autograd.Function`, which `torch.export` flattens: nothing would train. The
operators here are composites of plain aten ones, and round by `x + (round(x) - x).detach()`, which
is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_library = torch.library.Library("graphtune", "FRAGMENT")


def bounds(bits: int) -> tuple[int, int]:
    """The least and the largest signed integer of so many bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _asymmetric(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, int32, of 8 bits for values from low to high; 0 is among them."""
    least, largest = bounds(8)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (largest - least)
    scale = scale.clamp(min=torch.finfo(scale.dtype).smallest_normal)
    zero_point = (least - (low / scale).round()).clamp(least, largest)
    return scale, zero_point.to(torch.int32)


def _fake_quantize_weight(
    weight: Tensor,
    axis: int,
    group: int,
    bits: int,
    bfloat16_scale: bool,
    enabled: Tensor | None = None,
) -> Tensor:
    least, largest = bounds(bits)
    groups = weight.unflatten(axis, (-1, group))
    values = groups.detach()
    absmax = torch.maximum(values.amax(axis, keepdim=True), -values.amin(axis, keepdim=True))
    scale = absmax.clamp(min=0) / ((largest - least) / 2)
    scale = scale.clamp(min=torch.finfo(scale.dtype).smallest_normal)
    if bfloat16_scale:
        scale = scale.to(torch.bfloat16)
    codes = _round(groups * (1.0 / scale)).clamp(least, largest)
    rounded = (codes * scale).reshape(weight.shape)
    return rounded if enabled is None else torch.where(enabled, rounded, weight)


def _fake_quantize_tokens(x: Tensor, enabled: Tensor | None = None) -> Tensor:
    values = x.detach()
    scale, zero_point = _asymmetric(values.amin(-1, keepdim=True), values.amax(-1, keepdim=True))
    codes = (_round(x * (1.0 / scale)) + zero_point).clamp(*bounds(8))
    rounded = (codes - zero_point.to(x.dtype)) * scale
    return rounded if enabled is None else torch.where(enabled, rounded, x)


def _fake_quantize_tensor(x: Tensor, observed: Tensor, enabled: Tensor | None = None) -> Tensor:
    scale, zero_point = static_qparams(observed)
    is_on = observed[1] > observed[0]
    # Nothing observed yet: a scale that overflows nothing, whose result is not taken.
    scale = torch.where(is_on, scale, 1.0)
    codes = (_round(x.float() * (1.0 / scale)) + zero_point).clamp(*bounds(8))
    rounded = ((codes - zero_point.float()) * scale).to(x.dtype)
    return torch.where(is_on if enabled is None else is_on & enabled, rounded, x)


def static_qparams(observed: Tensor) -> tuple[Tensor, Tensor]:
    """Scale float32 () and zero point int32 () of 8 bits, for values in [observed[0], [1]]."""
    return _asymmetric(observed[0], observed[1])


def _define(schema: str, composite: Any) -> Any:
    name = _library.define(schema)
    _library.impl(name, composite, "CompositeImplicitAutograd")
    return getattr(torch.ops.graphtune, name.split("::")[-1]).default


fake_quantize_weight = _define(
    "fake_quantize_weight(Tensor weight, int axis, int group, int bits, bool bfloat16_scale, "
    "Tensor? enabled=None) -> Tensor",
    _fake_quantize_weight,
)
"""(weight, axis, group, bits, bfloat16_scale) -> the same shape and dtype. Every `group` elements
along `axis`, counted from the end, share a scale: their largest magnitude over half of the
integers' range, in the weight's dtype or in bfloat16.
Where the bool tensor `enabled` () is False, the weight stays as it is."""

fake_quantize_tokens = _define(
    "fake_quantize_tokens(Tensor x, Tensor? enabled=None) -> Tensor", _fake_quantize_tokens
)
"""(x (..., width)) -> the same shape and dtype: 8 bits, with a scale and a zero point for each row,
from its least and its largest value."""

fake_quantize_tensor = _define(
    "fake_quantize_tensor(Tensor x, Tensor observed, Tensor? enabled=None) -> Tensor",
    _fake_quantize_tensor,
)
"""(x, observed float32 (2,)) -> the same shape and dtype: 8 bits, with one scale and zero point,
for values from observed[0] to observed[1]; x as it is while these are equal."""


def rounds_inputs(graph: fx.Graph) -> bool:
    """Whether a graph rounds what its linears are given, and not weights alone: by `QAT`, or to
    integers by `Convert`."""
    rounding = (fake_quantize_tokens, fake_quantize_tensor)
    return any(
        node.target in rounding or "choose_qparams_affine" in str(node.target)
        for node in graph.nodes
    )
