"""Phi 3, 3.5 and 4: a Llama with fused projections, and LongRoPE."""

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size, shapes
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    layer = LayerOptions(
        reading.attention(config, window=config.sliding_window, fused=True),
        reading.feed_forward(config, fused=True),
    )
    return reading.decoder(
        config, [layer] * config.num_hidden_layers, residual_dropout=config.resid_pdrop
    )


_MINI = Size(3_821_079_552, shapes(32064, 3072, 8192, 32, 32, 32))

FAMILY = Family(
    "phi3",
    read,
    {
        "microsoft/Phi-3-mini-4k-instruct": _MINI,
        "microsoft/Phi-3-medium-4k-instruct": Size(
            13_960_238_080, shapes(32064, 5120, 17920, 40, 40, 10)
        ),
        "microsoft/Phi-3.5-mini-instruct": _MINI,
        "microsoft/phi-4": Size(14_659_507_200, shapes(100352, 5120, 17920, 40, 40, 10)),
        "microsoft/Phi-4-mini-instruct": Size(
            3_836_021_760, shapes(200064, 3072, 8192, 32, 24, 8, tie_word_embeddings=True)
        ),
    },
)
