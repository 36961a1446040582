"""Qwen 1.5 and 2, mixtures of experts: Qwen 2 with an expert that all tokens share."""

from dataclasses import replace

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size
from graphtune.models.moe import MoeOptions
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    attention = reading.attention(config, bias=config.qkv_bias)
    dense = reading.feed_forward(config)
    sparse = MoeOptions(
        config.moe_intermediate_size,
        config.num_experts,
        config.num_experts_per_tok,
        normalize=config.norm_topk_prob,
        shared=replace(dense, size=config.shared_expert_intermediate_size),
        activation=dense.activation,
    )
    layers = [
        LayerOptions(replace(attention, window=w), sparse if is_sparse(config, i) else dense)
        for i, w in enumerate(reading.windows(config))
    ]
    return reading.decoder(config, layers)


def is_sparse(config: PretrainedConfig, layer: int) -> bool:
    """Whether a layer, counted from 0, has experts."""
    on_step = config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
    return on_step and layer not in config.mlp_only_layers


_A2_7B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
_A14B = {
    "vocab_size": 151936,
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480,
}

FAMILY = Family(
    "qwen2_moe",
    read,
    {
        "Qwen/Qwen1.5-MoE-A2.7B": Size(14_315_784_192, _A2_7B),
        "Qwen/Qwen2-57B-A14B": Size(57_408_658_944, _A14B),
    },
)
