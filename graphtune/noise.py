"""Noise that is added in training only, as an operator.

It is a composite of plain aten ones, as dropout is: in evaluation nothing is left of it, and no
random number is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("graphtune", "FRAGMENT")
_library.define("neftune(Tensor embedded, float alpha, bool training) -> Tensor")


def _neftune(embedded: Tensor, alpha: float, training: bool) -> Tensor:
    if not training:
        return embedded
    _, length, width = embedded.shape
    # A tensor, since a compiler would fix a number that depends on the length.
    size = torch.full((), length * width, dtype=torch.float32, device=embedded.device)
    return embedded + torch.empty_like(embedded).uniform_(-1, 1) * (alpha / size.sqrt())


_library.impl("neftune", _neftune, "CompositeImplicitAutograd")

neftune = torch.ops.graphtune.neftune.default
"""(embedded (batch, seq, width), alpha, training) -> the same shape. In training there is added to
each number one drawn from the uniform distribution on [-b, b], b = alpha / sqrt(seq * width)."""
