"""Qwen 3, mixtures of experts: no expert is shared."""

from typing import Any

from transformers import PretrainedConfig

from graphtune.models.families import reading
from graphtune.models.families.family import Family, Size
from graphtune.models.families.qwen2_moe import is_sparse
from graphtune.models.moe import MoeOptions
from graphtune.models.transformer import DecoderOptions, LayerOptions


def read(config: PretrainedConfig) -> DecoderOptions:
    attention = reading.attention(
        config,
        bias=config.attention_bias,
        output_bias=config.attention_bias,
        qk_norm=reading.norm(config),
        window=config.sliding_window,
    )
    dense = reading.feed_forward(config)
    sparse = MoeOptions(
        config.moe_intermediate_size,
        config.num_experts,
        config.num_experts_per_tok,
        normalize=config.norm_topk_prob,
        activation=dense.activation,
    )
    layers = [
        LayerOptions(attention, sparse if is_sparse(config, layer) else dense)
        for layer in range(config.num_hidden_layers)
    ]
    return reading.decoder(config, layers)


def _shapes(hidden: int, layers: int, heads: int, expert: int) -> dict[str, Any]:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "moe_intermediate_size": expert,
    }


FAMILY = Family(
    "qwen3_moe",
    read,
    {
        "Qwen/Qwen3-30B-A3B": Size(30_532_122_624, _shapes(2048, 48, 32, 768)),
        "Qwen/Qwen3-235B-A22B": Size(235_093_634_560, _shapes(4096, 94, 64, 1536)),
    },
)
