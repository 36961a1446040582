"""Phi 3, 3.5 and 4: a Llama with fused projections, and LongRoPE."""

from typing import Any

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    layer = LayerOptions(
        reading.attention(config, window=config.sliding_window, fused=True),
        reading.feed_forward(config, fused=True),
    )
    return reading.decoder(
        config, [layer] * config.num_hidden_layers, residual_dropout=config.resid_pdrop
    )


def _shapes(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: bool
) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    } | more


_MINI = Size(3_821_079_552, _shapes(32064, 3072, 8192, 32, 32, 32))

FAMILY = Family(
    "phi3",
    read,
    {
        "microsoft/Phi-3-mini-4k-instruct": _MINI,
        "microsoft/Phi-3-medium-4k-instruct": Size(
            13_960_238_080, _shapes(32064, 5120, 17920, 40, 40, 10)
        ),
        "microsoft/Phi-3.5-mini-instruct": _MINI,
        "microsoft/phi-4": Size(14_659_507_200, _shapes(100352, 5120, 17920, 40, 40, 10)),
        "microsoft/Phi-4-mini-instruct": Size(
            3_836_021_760, _shapes(200064, 3072, 8192, 32, 24, 8, tie_word_embeddings=True)
        ),
    },
)
