"""Gemma 1: a Llama with GeGLU, wide heads, a scaled embedding and norms stored less one."""

from typing import Any

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    bias = config.attention_bias
    layer = LayerOptions(
        reading.attention(config, bias=bias, output_bias=bias), reading.feed_forward(config)
    )
    return reading.decoder(
        config,
        [layer] * config.num_hidden_layers,
        norm=reading.norm(config, plus_one=True),
        embedding_scale=config.hidden_size**0.5,
    )


def _shapes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    return {
        "vocab_size": 256000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
    }


FAMILY = Family(
    "gemma",
    read,
    {
        "google/gemma-2b": Size(2_506_172_416, _shapes(2048, 16384, 18, 8, 1)),
        "google/gemma-7b": Size(8_537_680_896, _shapes(3072, 24576, 28, 16, 16)),
    },
)
