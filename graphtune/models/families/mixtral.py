"""Mixtral: Mistral with experts in every layer."""

from typing import Any

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size
from graphtune.models.moe import MoeOptions
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    experts = MoeOptions(
        config.intermediate_size,
        config.num_local_experts,
        config.num_experts_per_tok,
        activation=reading.activation(config),
    )
    layer = LayerOptions(reading.attention(config, window=config.sliding_window), experts)
    return reading.decoder(config, [layer] * config.num_hidden_layers)


def _shapes(vocab: int, hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
    }


FAMILY = Family(
    "mixtral",
    read,
    {
        "mistralai/Mixtral-8x7B-v0.1": Size(46_702_792_704, _shapes(32000, 4096, 14336, 32, 32)),
        "mistralai/Mixtral-8x22B-v0.1": Size(140_620_634_112, _shapes(32000, 6144, 16384, 56, 48)),
    },
)
