"""Gemma 3, its text decoder: query and key norms instead of caps, and two rotary bases."""

from typing import Any

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    norm = reading.norm(config, plus_one=True)
    feed_forward = reading.feed_forward(config)
    layers = []
    for kind, window in zip(config.layer_types, reading.windows(config), strict=True):
        attention = reading.attention(
            config,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            scale=config.query_pre_attn_scalar**-0.5,
            rope=reading.rope(config, config.rope_parameters[kind]),
            window=window,
            qk_norm=norm,
        )
        layers.append(LayerOptions(attention, feed_forward))
    return reading.decoder(
        config,
        layers,
        norm=norm,
        sandwich=True,
        embedding_scale=config.hidden_size**0.5,
        logit_cap=config.final_logit_softcapping,
    )


def _shapes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **different: int
) -> dict[str, Any]:
    return {
        "vocab_size": 262208,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
    } | different


# Of 4b and larger ones this is the text decoder; their checkpoints have images too, and another
# model type, which only `transformers` loads.
FAMILY = Family(
    "gemma3_text",
    read,
    {
        "google/gemma-3-270m": Size(268_098_176, _shapes(640, 2048, 18, 4, 1, vocab_size=262144)),
        "google/gemma-3-1b-pt": Size(999_885_952, _shapes(1152, 6912, 26, 4, 1, vocab_size=262144)),
        "google/gemma-3-4b-pt": Size(3_880_263_168, _shapes(2560, 10240, 34, 8, 4)),
        "google/gemma-3-12b-pt": Size(11_766_034_176, _shapes(3840, 15360, 48, 16, 8)),
        "google/gemma-3-27b-pt": Size(
            27_009_346_304, _shapes(5376, 21504, 62, 32, 16, head_dim=128)
        ),
    },
)
