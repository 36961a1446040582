"""Llama 2, 3, 3.1, 3.2 and 3.3."""

from typing import Any

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size, shapes
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    layer = LayerOptions(
        reading.attention(config, bias=config.attention_bias, output_bias=config.attention_bias),
        reading.feed_forward(config, bias=config.mlp_bias),
    )
    return reading.decoder(config, [layer] * config.num_hidden_layers)


def _llama3(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return shapes(128256, hidden, intermediate, layers, heads, 8, **more)


_8B = Size(8_030_261_248, _llama3(4096, 14336, 32, 32))
_70B = Size(70_553_706_496, _llama3(8192, 28672, 80, 64))

FAMILY = Family(
    "llama",
    read,
    {
        "meta-llama/Llama-2-7b-hf": Size(6_738_415_616, shapes(32000, 4096, 11008, 32, 32, 32)),
        "meta-llama/Llama-2-13b-hf": Size(13_015_864_320, shapes(32000, 5120, 13824, 40, 40, 40)),
        "meta-llama/Llama-2-70b-hf": Size(68_976_648_192, shapes(32000, 8192, 28672, 80, 64, 8)),
        "meta-llama/Meta-Llama-3-8B": _8B,
        "meta-llama/Meta-Llama-3-70B": _70B,
        "meta-llama/Llama-3.1-8B": _8B,
        "meta-llama/Llama-3.1-70B": _70B,
        "meta-llama/Llama-3.1-405B": Size(405_853_388_800, _llama3(16384, 53248, 126, 128)),
        "meta-llama/Llama-3.2-1B": Size(
            1_235_814_400, _llama3(2048, 8192, 16, 32, tie_word_embeddings=True)
        ),
        "meta-llama/Llama-3.2-3B": Size(
            3_212_749_824, _llama3(3072, 8192, 28, 24, tie_word_embeddings=True)
        ),
        "meta-llama/Llama-3.3-70B-Instruct": _70B,
    },
)
