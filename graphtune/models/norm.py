"""Norms of hidden states."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NormOptions:
    """What a norm computes.

    Attributes:
        kind: "rms" (Zhang and Sennrich 2019) or "layer" (Ba et al. 2016; with a bias).
        eps: added to the mean square or the variance.
        plus_one: the weight is stored less one, and applied in float32 (Gemma); "rms" only.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    plus_one: bool = False

    def build(self, size: int) -> nn.Module:
        if self.kind == "layer":
            return nn.LayerNorm(size, self.eps)
        return RMSNorm(size, self)


class RMSNorm(nn.Module):
    """(..., size) -> (..., size), of the input's dtype; the statistics are float32."""

    def __init__(self, size: int, options: NormOptions) -> None:
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.zeros(size) if options.plus_one else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.options.eps)
        if self.options.plus_one:
            return (normed * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)
