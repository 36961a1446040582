"""The decoder-only transformer, defined once.

Options say what a model computes; there is nothing here of adapters, quantization, parallelism,
caches or training. A model family is a function from a Hugging Face config to `DecoderOptions`
(`graphtune.models.families`). Parameters have the names that `transformers` gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphtune.models.attention import Attention, AttentionOptions, attention_masks, soft_cap
from graphtune.models.feed_forward import FeedForwardOptions
from graphtune.models.moe import MoeOptions
from graphtune.models.norm import NormOptions
from graphtune.models.rope import Rope, RotaryEmbedding, Rotation


@dataclass(frozen=True)
class LayerOptions:
    """One layer: what may differ between the layers of a model."""

    attention: AttentionOptions
    feed_forward: FeedForwardOptions | MoeOptions


@dataclass(frozen=True)
class DecoderOptions:
    """A whole model.

    Attributes:
        vocab_size, hidden_size: of the embedding.
        layers: one for each layer; equal ones share masks and rotations.
        norm: of all norms but those of queries and keys.
        sandwich: a norm after attention and feed-forward as well as before (Gemma 2).
        tied: the output head is the embedding.
        padding_id: a token whose row of the embedding gets no gradient.
        embedding_scale, residual_scale, logit_scale: factors on embeddings, on what a layer adds
            to the residual stream, and on logits.
        logit_cap: logits x become `logit_cap * tanh(x / logit_cap)`.
        embedding_dropout, residual_dropout: of embeddings and of what a layer adds, in training.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerOptions, ...]
    norm: NormOptions
    sandwich: bool = False
    tied: bool = False
    padding_id: int | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0


class Transformer(nn.Module):
    """A causal language model; it lays the windows of its layers into the mask by itself.

    Attributes:
        options: what it computes.
        config: the config that the options were read from, kept for whoever saves the model.
    """

    config: Any

    def __init__(self, options: DecoderOptions) -> None:
        super().__init__()
        self.options = options
        self.model = Decoder(options)
        self.lm_head = nn.Linear(options.hidden_size, options.vocab_size, bias=False)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            input_ids: int64 (batch, seq).
            attention_mask: see `attention_masks`; None is causal.
            position_ids: int64 (batch, seq); None counts from zero.

        Returns:
            Logits (batch, seq, vocab) in the dtype of the weights.

        Raises:
            UserError: a mask of another shape, or of four dimensions and not boolean.
        """
        logits = self.lm_head(self.model(input_ids, attention_mask, position_ids))
        if self.options.logit_scale != 1:
            logits = logits * self.options.logit_scale
        if self.options.logit_cap is not None:
            logits = soft_cap(logits, self.options.logit_cap)
        return logits

    def tie_weights(self) -> None:
        """Make the head the embedding again, where they are tied."""
        if self.options.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """Random weights to start from: matrices of this standard deviation, no biases."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)


class Decoder(nn.Module):
    """Token ids -> hidden states (batch, seq, hidden)."""

    def __init__(self, options: DecoderOptions) -> None:
        super().__init__()
        self.options = options
        self.embed_tokens = Embedding(options)
        self.layers = nn.ModuleList(DecoderLayer(options, layer) for layer in options.layers)
        self.norm = options.norm.build(options.hidden_size)
        ropes = dict.fromkeys(layer.attention.rope for layer in options.layers)
        self.ropes = [rope for rope in ropes if rope is not None]
        self.rotary_emb = nn.ModuleList(RotaryEmbedding(rope) for rope in self.ropes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        attention = [layer.attention for layer in self.options.layers]
        masks = attention_masks((one.window for one in attention), attention_mask, input_ids)
        x = self.embed_tokens(input_ids)
        rotations: dict[Rope | None, Rotation | None] = {None: None}
        for rope, turn in zip(self.ropes, self.rotary_emb, strict=True):
            rotations[rope] = turn(position_ids, x.dtype)
        if self.options.embedding_dropout:
            x = F.dropout(x, self.options.embedding_dropout, self.training)
        for layer, one in zip(self.layers, attention, strict=True):
            x = layer(x, masks[one.window], rotations[one.rope])
        return self.norm(x)


class Embedding(nn.Embedding):
    """(batch, seq) -> (batch, seq, hidden); the scale is rounded to the weights' dtype."""

    embed_scale: Tensor

    def __init__(self, options: DecoderOptions) -> None:
        super().__init__(options.vocab_size, options.hidden_size, options.padding_id)
        self.is_scaled = options.embedding_scale != 1
        if self.is_scaled:
            scale = torch.tensor(options.embedding_scale)
            self.register_buffer("embed_scale", scale, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = super().forward(input_ids)
        return rows * self.embed_scale.to(self.weight.dtype) if self.is_scaled else rows


class DecoderLayer(nn.Module):
    """(batch, seq, hidden) -> (batch, seq, hidden)."""

    def __init__(self, options: DecoderOptions, layer: LayerOptions) -> None:
        super().__init__()
        self.options = options
        size, norm = options.hidden_size, options.norm
        self.self_attn = Attention(size, layer.attention)
        self.mlp = layer.feed_forward.build(size)
        self.input_layernorm = norm.build(size)
        self.post_attention_layernorm = norm.build(size)
        if options.sandwich:
            self.pre_feedforward_layernorm = norm.build(size)
            self.post_feedforward_layernorm = norm.build(size)

    def forward(self, x: Tensor, mask: Tensor, rotation: Rotation | None) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(x), mask, rotation)
        if not self.options.sandwich:  # the name is the sandwich's; here it comes before
            x = self._add(x, mixed)
            return self._add(x, self.mlp(self.post_attention_layernorm(x)))
        x = self._add(x, self.post_attention_layernorm(mixed))
        fed = self.mlp(self.pre_feedforward_layernorm(x))
        return self._add(x, self.post_feedforward_layernorm(fed))

    def _add(self, x: Tensor, update: Tensor) -> Tensor:
        if self.options.residual_dropout:
            update = F.dropout(update, self.options.residual_dropout, self.training)
        if self.options.residual_scale != 1:
            update = update * self.options.residual_scale
        return x + update
