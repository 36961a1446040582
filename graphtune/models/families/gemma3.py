"""Gemma 3, its text decoder: query and key norms instead of caps, and two rotary bases."""

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size, shapes
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


# Of 4b and larger ones this is the text decoder; their checkpoints have images too, and another
# model type, which only `transformers` loads.
FAMILY = Family(
    "gemma3_text",
    read,
    {
        "google/gemma-3-270m": Size(268_098_176, shapes(262144, 640, 2048, 18, 4, 1, head_dim=256)),
        "google/gemma-3-1b-pt": Size(
            999_885_952, shapes(262144, 1152, 6912, 26, 4, 1, head_dim=256)
        ),
        "google/gemma-3-4b-pt": Size(
            3_880_263_168, shapes(262208, 2560, 10240, 34, 8, 4, head_dim=256)
        ),
        "google/gemma-3-12b-pt": Size(
            11_766_034_176, shapes(262208, 3840, 15360, 48, 16, 8, head_dim=256)
        ),
        "google/gemma-3-27b-pt": Size(
            27_009_346_304, shapes(262208, 5376, 21504, 62, 32, 16, head_dim=128)
        ),
    },
)
