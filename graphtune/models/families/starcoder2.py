"""StarCoder2: layer norms, biases everywhere, and a feed-forward part without a gate."""

from typing import Any

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size
from graphtune.models.norm import NormOptions
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    bias = config.use_bias
    layer = LayerOptions(
        reading.attention(config, bias=bias, output_bias=bias, window=config.sliding_window),
        reading.feed_forward(config, gated=False, bias=bias),
    )
    return reading.decoder(
        config,
        [layer] * config.num_hidden_layers,
        norm=NormOptions("layer", config.norm_epsilon),
        embedding_dropout=config.embedding_dropout,
        residual_dropout=config.residual_dropout,
    )


def _shapes(
    hidden: int, layers: int, heads: int, kv_heads: int, tied: bool = True
) -> dict[str, Any]:
    return {
        "vocab_size": 49152,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


FAMILY = Family(
    "starcoder2",
    read,
    {
        "bigcode/starcoder2-3b": Size(3_030_371_328, _shapes(3072, 30, 24, 2)),
        "bigcode/starcoder2-7b": Size(7_173_923_840, _shapes(4608, 32, 36, 4)),
        "bigcode/starcoder2-15b": Size(15_957_889_024, _shapes(6144, 40, 48, 4, tied=False)),
    },
)
