"""Qwen 2 and 2.5: a Llama with biases on queries, keys and values."""

from dataclasses import replace

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size, shapes
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    attention = reading.attention(config, bias=True)
    feed_forward = reading.feed_forward(config)
    layers = [
        LayerOptions(replace(attention, window=w), feed_forward) for w in reading.windows(config)
    ]
    return reading.decoder(config, layers)


_0_5B = Size(494_032_768, shapes(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True))
_1_5B = Size(1_543_714_304, shapes(151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True))
_7B = Size(7_615_616_512, shapes(152064, 3584, 18944, 28, 28, 4))
_72B = Size(72_706_203_648, shapes(152064, 8192, 29568, 80, 64, 8))

FAMILY = Family(
    "qwen2",
    read,
    {
        "Qwen/Qwen2-0.5B": _0_5B,
        "Qwen/Qwen2-1.5B": _1_5B,
        "Qwen/Qwen2-7B": _7B,
        "Qwen/Qwen2-72B": _72B,
        "Qwen/Qwen2.5-0.5B": _0_5B,
        "Qwen/Qwen2.5-1.5B": _1_5B,
        "Qwen/Qwen2.5-3B": Size(
            3_085_938_688, shapes(151936, 2048, 11008, 36, 16, 2, tie_word_embeddings=True)
        ),
        "Qwen/Qwen2.5-7B": _7B,
        "Qwen/Qwen2.5-14B": Size(14_770_033_664, shapes(152064, 5120, 13824, 48, 40, 8)),
        "Qwen/Qwen2.5-32B": Size(32_763_876_352, shapes(152064, 5120, 27648, 64, 40, 8)),
        "Qwen/Qwen2.5-72B": _72B,
    },
)
