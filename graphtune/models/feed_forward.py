"""The feed-forward part of a layer, gated or plain."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class FeedForwardOptions:
    """What a dense feed-forward part computes.

    Attributes:
        size: channels within.
        activation: with a gate, "silu" makes a SwiGLU and "gelu" a GeGLU (Shazeer 2020).
        gated: the activation of one projection multiplies another.
        fused: gate and other projection are one, `gate_up_proj`.
        bias: of all projections.
    """

    size: int
    activation: Activation = "silu"
    gated: bool = True
    fused: bool = False
    bias: bool = False

    def build(self, hidden_size: int) -> nn.Module:
        return (GatedFeedForward if self.gated else FeedForward)(hidden_size, self)


class GatedFeedForward(nn.Module):
    """(..., hidden) -> (..., hidden)."""

    def __init__(self, hidden_size: int, options: FeedForwardOptions) -> None:
        super().__init__()
        self.options = options
        if options.fused:
            self.gate_up_proj = nn.Linear(hidden_size, 2 * options.size, options.bias)
        else:
            self.gate_proj = nn.Linear(hidden_size, options.size, options.bias)
            self.up_proj = nn.Linear(hidden_size, options.size, options.bias)
        self.down_proj = nn.Linear(options.size, hidden_size, options.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.options.fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ACTIVATIONS[self.options.activation](gate) * up)


class FeedForward(nn.Module):
    """(..., hidden) -> (..., hidden)."""

    def __init__(self, hidden_size: int, options: FeedForwardOptions) -> None:
        super().__init__()
        self.options = options
        self.c_fc = nn.Linear(hidden_size, options.size, options.bias)
        self.c_proj = nn.Linear(options.size, hidden_size, options.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(ACTIVATIONS[self.options.activation](self.c_fc(x)))
