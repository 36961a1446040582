"""Granite 3: a Llama with factors on embeddings, scores, residuals and logits."""

from typing import Any

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    bias = config.attention_bias
    scale = config.attention_multiplier
    layer = LayerOptions(
        reading.attention(config, bias=bias, output_bias=bias, scale=scale),
        reading.feed_forward(config, bias=config.mlp_bias),
    )
    return reading.decoder(
        config,
        [layer] * config.num_hidden_layers,
        embedding_scale=config.embedding_multiplier,
        residual_scale=config.residual_multiplier,
        logit_scale=1 / config.logits_scaling,
    )


def _shapes(hidden: int, intermediate: int) -> dict[str, Any]:
    return {
        "vocab_size": 49159,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    }


FAMILY = Family(
    "granite",
    read,
    {
        "ibm-granite/granite-3.3-2b-base": Size(2_533_539_840, _shapes(2048, 8192)),
        "ibm-granite/granite-3.3-8b-base": Size(8_170_864_640, _shapes(4096, 12800)),
    },
)
