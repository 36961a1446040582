"""Causal self-attention over grouped heads, and its masks."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphtune.errors import UserError
from graphtune.models.norm import NormOptions
from graphtune.models.rope import Rope, Rotation, rotate


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer's attention computes.

    Attributes:
        heads: of queries; `kv_heads` of keys and values, each shared by heads / kv_heads queries
            (Ainslie et al. 2023).
        head_dim: channels of a head.
        scale: what scores are multiplied with.
        rope: how positions are told; None: not at all (NoPE).
        window: how many keys up to itself a token sees; None: all.
        bias, output_bias: of the projections to queries, keys and values, and of the last one.
        fused: one projection `qkv_proj` instead of `q_proj`, `k_proj` and `v_proj`.
        qk_norm: norm of each query and key head before it is turned.
        cap: scores s become `cap * tanh(s / cap)`.
        dropout: of attention weights, while training.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    bias: bool = False
    output_bias: bool = False
    fused: bool = False
    qk_norm: NormOptions | None = None
    cap: float | None = None
    dropout: float = 0.0


class Attention(nn.Module):
    def __init__(self, hidden_size: int, options: AttentionOptions) -> None:
        super().__init__()
        self.options = options
        width = options.head_dim
        self.widths = [options.heads * width, options.kv_heads * width, options.kv_heads * width]
        if options.fused:
            self.qkv_proj = nn.Linear(hidden_size, sum(self.widths), options.bias)
        else:
            self.q_proj = nn.Linear(hidden_size, self.widths[0], options.bias)
            self.k_proj = nn.Linear(hidden_size, self.widths[1], options.bias)
            self.v_proj = nn.Linear(hidden_size, self.widths[2], options.bias)
        self.o_proj = nn.Linear(self.widths[0], hidden_size, options.output_bias)
        if options.qk_norm is not None:
            self.q_norm = options.qk_norm.build(width)
            self.k_norm = options.qk_norm.build(width)

    def forward(self, x: Tensor, mask: Tensor, rotation: Rotation | None) -> Tensor:
        """x (batch, seq, hidden), mask bool (batch or 1, 1, seq, seq) -> (batch, seq, hidden)."""
        q, k, v = (self._heads(part) for part in self._project(x))
        if self.options.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (batch, heads, seq, head_dim)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = self._attend(q, self._repeat(k), self._repeat(v), mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor) -> Iterable[Tensor]:
        if self.options.fused:
            return self.qkv_proj(x).split(self.widths, dim=-1)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.options.head_dim))

    def _repeat(self, x: Tensor) -> Tensor:
        """Keys or values, one for each query head.

        `scaled_dot_product_attention(enable_gqa=True)` would do it too, but with a mask only its
        slowest kernel can.
        """
        sharing = self.options.heads // self.options.kv_heads
        return x if sharing == 1 else x[:, :, None].expand(-1, -1, sharing, -1, -1).flatten(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        dropout = self.options.dropout if self.training else 0.0
        if self.options.cap is None:
            return F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=dropout, scale=self.options.scale
            )
        scores = soft_cap(q @ k.transpose(2, 3) * self.options.scale, self.options.cap)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return F.dropout(weights, dropout) @ v if dropout else weights @ v


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Values bent smoothly into (-cap, cap), the small ones left nearly as they are."""
    return torch.tanh(x / cap) * cap


def attention_masks(
    windows: Iterable[int | None], attention_mask: Tensor | None, input_ids: Tensor
) -> dict[int | None, Tensor]:
    """For each window, which keys (last) each query (third) sees: bool (batch or 1, 1, seq, seq).

    Args:
        windows: of the layers.
        attention_mask: None is causal; (batch, seq), where zero is padding, is causal without the
            padding; bool (batch, 1, seq, seq) is taken as it is, and gets only the windows.
        input_ids: (batch, seq).

    Raises:
        UserError: a mask of another shape, or of four dimensions and not boolean.
    """
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    before = index[:, None] - index  # how far a key lies before the query
    if attention_mask is None:
        full = (before >= 0)[None, None]
    elif attention_mask.dim() == 2:
        full = (before >= 0) & attention_mask.bool()[:, None, None, :]
    elif attention_mask.dim() == 4 and attention_mask.dtype == torch.bool:
        full = attention_mask
    else:
        raise UserError(
            f"attention_mask: {tuple(attention_mask.shape)} of {attention_mask.dtype} is not a "
            "mask; give (batch, seq), or (batch, 1, seq, seq) of torch.bool"
        )
    return {w: full if w is None else full & (before < w) for w in dict.fromkeys(windows)}
