"""SmolLM3: a Llama with layers that are told no positions."""

from dataclasses import replace

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    bias = config.attention_bias
    attention = reading.attention(config, bias=bias, output_bias=bias)
    feed_forward = reading.feed_forward(config, bias=config.mlp_bias)
    layers = [
        LayerOptions(
            replace(attention, window=window, rope=attention.rope if has_rope else None),
            feed_forward,
        )
        for window, has_rope in zip(reading.windows(config), config.no_rope_layers, strict=False)
    ]
    return reading.decoder(config, layers)


FAMILY = Family(
    "smollm3",
    read,
    {
        "HuggingFaceTB/SmolLM3-3B": Size(
            3_075_098_624,
            {
                "vocab_size": 128256,
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
            },
        )
    },
)
