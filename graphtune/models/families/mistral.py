"""Mistral: a Llama whose layers may all have a window."""

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size, shapes
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    layer = LayerOptions(
        reading.attention(config, window=config.sliding_window), reading.feed_forward(config)
    )
    return reading.decoder(config, [layer] * config.num_hidden_layers)


FAMILY = Family(
    "mistral",
    read,
    {
        "mistralai/Mistral-7B-v0.1": Size(
            7_241_732_096, shapes(32000, 4096, 14336, 32, 32, 8, head_dim=128)
        ),
        "mistralai/Mistral-7B-v0.3": Size(
            7_248_023_552, shapes(32768, 4096, 14336, 32, 32, 8, head_dim=128)
        ),
        "mistralai/Mistral-Nemo-Base-2407": Size(
            12_247_782_400, shapes(131072, 5120, 14336, 40, 32, 8, head_dim=128)
        ),
        "mistralai/Mistral-Small-Instruct-2409": Size(
            22_247_282_688, shapes(32768, 6144, 16384, 56, 48, 8, head_dim=128)
        ),
        "mistralai/Mistral-Small-24B-Base-2501": Size(
            23_572_403_200, shapes(131072, 5120, 32768, 40, 32, 8, head_dim=128)
        ),
        "mistralai/Mistral-Large-Instruct-2407": Size(
            122_610_069_504, shapes(32768, 12288, 28672, 88, 96, 8, head_dim=128)
        ),
    },
)
