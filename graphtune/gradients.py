"""A value whose gradients are known already, as an operator.

Where the gradient of a value is cheapest while the value is computed, as for a loss over a large
vocabulary, a graph computes both at once and joins them here. It is a composite: a compiler sees
in it nothing but the multiplications of the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("graphtune", "FRAGMENT")
_library.define("with_gradients(Tensor value, Tensor[] inputs, Tensor[] gradients) -> Tensor")


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        known = ctx.saved_tensors
        scaled = []
        for one, is_needed in zip(known, ctx.needs_input_grad[2:], strict=False):
            each = gradient.reshape(gradient.shape + (1,) * (one.dim() - gradient.dim()))
            scaled.append((one * each.to(one.dtype)) if is_needed else None)
        return None, None, *scaled, *(None for _ in known)


def _with_gradients(value: Tensor, inputs: Sequence[Tensor], known: Sequence[Tensor]) -> Tensor:
    detached = [gradient.detach() for gradient in known]
    return _WithGradients.apply(value.detach(), len(inputs), *inputs, *detached)


_library.impl("with_gradients", _with_gradients, "CompositeImplicitAutograd")

with_gradients = torch.ops.graphtune.with_gradients.default
"""(value, inputs, gradients) -> the value. Its gradient with respect to `inputs[i]` is
`gradients[i]`, of the same shape, times the gradient of what is made of the value. A value that is
no scalar has as dimensions the first ones of every input: each entry depends on its rows alone."""
