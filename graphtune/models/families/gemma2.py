"""Gemma 2: Gemma with norms on both sides, soft caps, and a window in every other layer."""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    attention = reading.attention(
        config,
        bias=config.attention_bias,
        output_bias=config.attention_bias,
        scale=config.query_pre_attn_scalar**-0.5,
        cap=config.attn_logit_softcapping,
    )
    feed_forward = reading.feed_forward(config)
    return reading.decoder(
        config,
        [LayerOptions(replace(attention, window=w), feed_forward) for w in reading.windows(config)],
        norm=reading.norm(config, plus_one=True),
        sandwich=True,
        embedding_scale=config.hidden_size**0.5,
        logit_cap=config.final_logit_softcapping,
    )


def _shapes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int = 256
) -> dict[str, Any]:
    return {
        "vocab_size": 256000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


FAMILY = Family(
    "gemma2",
    read,
    {
        "google/gemma-2-2b": Size(2_614_341_888, _shapes(2304, 9216, 26, 8, 4)),
        "google/gemma-2-9b": Size(9_241_705_984, _shapes(3584, 14336, 42, 16, 8)),
        "google/gemma-2-27b": Size(27_227_128_320, _shapes(4608, 36864, 46, 32, 16, 128)),
    },
)
