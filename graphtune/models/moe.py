"""A feed-forward part of many experts, of which each token visits a few.

Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; shared experts: Dai et al. 2024,
https://arxiv.org/abs/2401.06066.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# It takes the kernel that the dtype and the device have, and one operator that `torch.export` and
# `torch.compile` can hold where they have none.
from transformers.integrations.moe import _grouped_mm as grouped_mm

from graphtune.models.feed_forward import ACTIVATIONS, Activation, FeedForwardOptions


@dataclass(frozen=True)
class MoeOptions:
    """What a layer's experts compute.

    Attributes:
        size: channels within an expert; all are gated.
        experts: how many there are; `top_k` of them work for a token.
        normalize: the weights of a token's experts are made to sum up to one.
        shared: an expert of its own size that works for every token, through a sigmoid gate.
        activation: of the gates.
    """

    size: int
    experts: int
    top_k: int
    normalize: bool = True
    shared: FeedForwardOptions | None = None
    activation: Activation = "silu"

    def build(self, hidden_size: int) -> nn.Module:
        return MixtureOfExperts(hidden_size, self)


class MixtureOfExperts(nn.Module):
    """(batch, seq, hidden) -> (batch, seq, hidden)."""

    def __init__(self, hidden_size: int, options: MoeOptions) -> None:
        super().__init__()
        self.gate = Router(hidden_size, options)
        self.experts = Experts(hidden_size, options)
        self.has_shared = options.shared is not None
        if options.shared is not None:
            self.shared_expert = options.shared.build(hidden_size)
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens)
        out = self.experts(tokens, weights, chosen)
        if self.has_shared:
            out = out + self.shared_expert_gate(tokens).sigmoid() * self.shared_expert(tokens)
        return out.view_as(x)


class Router(nn.Module):
    """Chooses each token's experts."""

    def __init__(self, hidden_size: int, options: MoeOptions) -> None:
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.empty(options.experts, hidden_size))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, hidden) -> weights and numbers of the experts, both (tokens, top_k).

        Weights are float32, whatever the dtype of the model.
        """
        probabilities = F.linear(tokens, self.weight).softmax(-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.options.top_k, dim=-1)
        if self.options.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen


class Experts(nn.Module):
    """All experts' weights, each a stack (experts, out, in)."""

    def __init__(self, hidden_size: int, options: MoeOptions) -> None:
        super().__init__()
        self.options = options
        count, size = options.experts, options.size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, size))

    def forward(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """tokens (tokens, hidden), weights and chosen (tokens, top_k) -> (tokens, hidden).

        The visits are sorted by expert, so that each expert's are rows in a piece, whose ends are
        all that a grouped matrix product asks for.
        """
        expert_of, order = chosen.flatten().sort()
        every = torch.arange(self.options.experts, device=chosen.device)
        ends = torch.searchsorted(expert_of, every, right=True, out_int32=True)
        visits = tokens[order // self.options.top_k]
        gate, up = grouped_mm(visits, self.gate_up_proj.transpose(1, 2), ends).chunk(2, dim=-1)
        hidden = ACTIVATIONS[self.options.activation](gate) * up
        out = grouped_mm(hidden, self.down_proj.transpose(1, 2), ends)
        by_token = out[order.argsort()].unflatten(0, chosen.shape)
        return (by_token * weights[..., None]).sum(1).to(tokens.dtype)
