"""Mistral: a Llama whose layers may all have a window."""

from typing import Any

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    layer = LayerOptions(
        reading.attention(config, window=config.sliding_window), reading.feed_forward(config)
    )
    return reading.decoder(config, [layer] * config.num_hidden_layers)


def _shapes(vocab: int, hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }


FAMILY = Family(
    "mistral",
    read,
    {
        "mistralai/Mistral-7B-v0.1": Size(7_241_732_096, _shapes(32000, 4096, 14336, 32, 32)),
        "mistralai/Mistral-7B-v0.3": Size(7_248_023_552, _shapes(32768, 4096, 14336, 32, 32)),
        "mistralai/Mistral-Nemo-Base-2407": Size(
            12_247_782_400, _shapes(131072, 5120, 14336, 40, 32)
        ),
        "mistralai/Mistral-Small-Instruct-2409": Size(
            22_247_282_688, _shapes(32768, 6144, 16384, 56, 48)
        ),
        "mistralai/Mistral-Small-24B-Base-2501": Size(
            23_572_403_200, _shapes(131072, 5120, 32768, 40, 32)
        ),
        "mistralai/Mistral-Large-Instruct-2407": Size(
            122_610_069_504, _shapes(32768, 12288, 28672, 88, 96)
        ),
    },
)
