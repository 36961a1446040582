"""Qwen 3, dense: query and key norms instead of biases."""

from dataclasses import replace

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size, shapes
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


FAMILY = Family(
    "qwen3",
    read,
    {
        "Qwen/Qwen3-0.6B": Size(
            596_049_920,
            shapes(151936, 1024, 3072, 28, 16, 8, head_dim=128, tie_word_embeddings=True),
        ),
        "Qwen/Qwen3-1.7B": Size(
            1_720_574_976,
            shapes(151936, 2048, 6144, 28, 16, 8, head_dim=128, tie_word_embeddings=True),
        ),
        "Qwen/Qwen3-4B": Size(
            4_022_468_096,
            shapes(151936, 2560, 9728, 36, 32, 8, head_dim=128, tie_word_embeddings=True),
        ),
        "Qwen/Qwen3-8B": Size(8_190_735_360, shapes(151936, 4096, 12288, 36, 32, 8, head_dim=128)),
        "Qwen/Qwen3-14B": Size(
            14_768_307_200, shapes(151936, 5120, 17408, 40, 40, 8, head_dim=128)
        ),
        "Qwen/Qwen3-32B": Size(
            32_762_123_264, shapes(151936, 5120, 25600, 64, 64, 8, head_dim=128)
        ),
    },
)
