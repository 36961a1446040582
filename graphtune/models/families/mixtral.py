"""Mixtral: Mistral with experts in every layer."""

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size, shapes
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


FAMILY = Family(
    "mixtral",
    read,
    {
        "mistralai/Mixtral-8x7B-v0.1": Size(
            46_702_792_704, shapes(32000, 4096, 14336, 32, 32, 8, num_local_experts=8)
        ),
        "mistralai/Mixtral-8x22B-v0.1": Size(
            140_620_634_112, shapes(32000, 6144, 16384, 56, 48, 8, num_local_experts=8)
        ),
    },
)
