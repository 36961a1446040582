"""A tiny random model of any architecture in `transformers`' causal-LM mapping."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

VOCAB = 128

# What a field of a configuration becomes, by its name, wherever it stands.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim"), 32),
    **dict.fromkeys(("embedding_size", "embedding_dim", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "backbone_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "index_n_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("linear_head_dim", "kv_channels", "dim_head", "d_head"), 8),
    **dict.fromkeys(("attention_head_size", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("rotary_dim", "global_head_dim"), 8),
    "qk_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "dff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "dim_ff", "ffn_hidden_size", "d_inner"), 48),
    **dict.fromkeys(("feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_experts_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "n_groups"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "adapter_rank"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("max_target_positions", "context_length", "model_max_length"), 128),
    **dict.fromkeys(("max_source_positions",), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention"), 5),
    **dict.fromkeys(("sliding_window_size", "window_size", "attention_chunk_size"), 5),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("router_hidden_size", "laurel_rank", "hidden_size_per_layer_input"), 8),
    "attention_hidden_size": 32,
    "vocab_size_per_layer_input": VOCAB,
    "query_pre_attn_scalar": 8,
    "first_k_dense_replace": 1,
    "max_window_layers": 1,
}
# Fields that list a kind for every layer: each kind that the full model has comes up.
KINDS = ("layer_types", "mlp_layer_types")
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")

# What the rules above do not know of one architecture.
OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "minimax": {"block_size": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 8,
        }
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "num_query_groups": 4,
    },
}


def tiny_config(name: str) -> PretrainedConfig:
    """A small configuration of an architecture, as its own class makes it from small numbers."""
    kind = CONFIG_MAPPING[name]
    fields = _shrunk(kind)
    for key, value in OVERRIDES.get(name, {}).items():
        fields[key] = fields.get(key, {}) | value if isinstance(value, dict) else value
    config = kind(**copy.deepcopy(fields))
    for one in (config, config.get_text_config(decoder=True)):
        if hasattr(one, "is_decoder"):
            one.is_decoder = True
    return config


def _shrunk(kind: type[PretrainedConfig]) -> dict[str, Any]:
    try:
        default = kind()
    except Exception:  # a class whose own defaults do not fit together: overrides must do
        return {}
    present = default.to_dict()
    fields: dict[str, Any] = {}
    for key, value in present.items():
        if key in SIZES and isinstance(value, int) and not isinstance(value, bool):
            fields[key] = min(SIZES[key], value)
        elif key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            fields[key] = value if value < 3 else 100 + sum(map(ord, key)) % 28
        elif "drop" in key and isinstance(value, float):
            fields[key] = 0.0
    if "kv_lora_rank" in fields:  # latent attention has a key for every head
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields |= _layers(present)
    for key, part in getattr(kind, "sub_configs", {}).items():
        if isinstance(getattr(default, key, None), PretrainedConfig):
            own = type(getattr(default, key)) if part.__name__ == "AutoConfig" else part
            fields[key] = _shrunk(own) | {"model_type": own.model_type}
    return fields


def _layers(present: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {k: list(dict.fromkeys(present[k])) for k in KINDS if present.get(k)}
    kinds = {k: one for k, one in kinds.items() if len(one) > 1}
    depth = next((k for k in DEPTHS if k in present), None)
    if not kinds or depth is None:
        return {}
    count = max(2, *map(len, kinds.values()))
    lists = {k: [one[i % len(one)] for i in range(count)] for k, one in kinds.items()}
    return {depth: count, **lists}


def tiny_model(name: str) -> nn.Module:
    """A random model in train mode, in float32, without dropout."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("grouped_mm")
    # As initialised, a residual stream is so small that many errors would round away.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and float(parameter.std()) < 0.05:
                parameter.mul_(4)
    return model.train()
