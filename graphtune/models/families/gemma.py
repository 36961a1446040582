"""Gemma 1: a Llama with GeGLU, wide heads, a scaled embedding and norms stored less one."""

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size, shapes
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


FAMILY = Family(
    "gemma",
    read,
    {
        "google/gemma-2b": Size(2_506_172_416, shapes(256000, 2048, 16384, 18, 8, 1, head_dim=256)),
        "google/gemma-7b": Size(
            8_537_680_896, shapes(256000, 3072, 24576, 28, 16, 16, head_dim=256)
        ),
    },
)
