"""Qwen 3, dense: query and key norms instead of biases."""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    bias = config.attention_bias
    norm = reading.norm(config)
    attention = reading.attention(config, bias=bias, output_bias=bias, qk_norm=norm)
    feed_forward = reading.feed_forward(config)
    layers = [
        LayerOptions(replace(attention, window=w), feed_forward) for w in reading.windows(config)
    ]
    return reading.decoder(config, layers)


def _shapes(
    hidden: int, intermediate: int, layers: int, heads: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": tied,
    }


FAMILY = Family(
    "qwen3",
    read,
    {
        "Qwen/Qwen3-0.6B": Size(596_049_920, _shapes(1024, 3072, 28, 16, tied=True)),
        "Qwen/Qwen3-1.7B": Size(1_720_574_976, _shapes(2048, 6144, 28, 16, tied=True)),
        "Qwen/Qwen3-4B": Size(4_022_468_096, _shapes(2560, 9728, 36, 32, tied=True)),
        "Qwen/Qwen3-8B": Size(8_190_735_360, _shapes(4096, 12288, 36, 32)),
        "Qwen/Qwen3-14B": Size(14_768_307_200, _shapes(5120, 17408, 40, 40)),
        "Qwen/Qwen3-32B": Size(32_762_123_264, _shapes(5120, 25600, 64, 64)),
    },
)
