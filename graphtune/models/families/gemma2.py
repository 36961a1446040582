"""Gemma 2: Gemma with norms on both sides, soft caps, and a window in every other layer."""

from dataclasses import replace

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size, shapes
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


FAMILY = Family(
    "gemma2",
    read,
    {
        "google/gemma-2-2b": Size(
            2_614_341_888, shapes(256000, 2304, 9216, 26, 8, 4, head_dim=256)
        ),
        "google/gemma-2-9b": Size(
            9_241_705_984, shapes(256000, 3584, 14336, 42, 16, 8, head_dim=256)
        ),
        "google/gemma-2-27b": Size(
            27_227_128_320, shapes(256000, 4608, 36864, 46, 32, 16, head_dim=128)
        ),
    },
)
