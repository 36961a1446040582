"""What a GGUF file says about a model, by the names and the conventions of llama.cpp.

Source: llama.cpp's loaders of each architecture (src/models/) and `gguf`'s tables of names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from transformers import PretrainedConfig

from graphtune.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp runs a model type.

    Attributes:
        kind: its name there.
        activation: of the feed-forward, by transformers' name.
        interleaved: whether rotary embeddings turn neighbours, not the halves of a head.
        norm_offset: what llama.cpp expects to be added to the weights of norms already.
        tied: whether the output head can only be the embedding.
        window_every: of so many layers the last attends to everything, the others to a window;
            0: all attend to everything.
        scaled_by_width: the number of layers for which attention is scaled by width / heads
            instead of by the width of a head, as in Gemma's 27B.
    """

    kind: MODEL_ARCH
    activation: str = "silu"
    interleaved: bool = False
    norm_offset: float = 0.0
    tied: bool = False
    window_every: int = 0
    scaled_by_width: int | None = None


_GEMMA: dict[str, Any] = {"activation": "gelu_pytorch_tanh", "norm_offset": 1.0}
# by transformers' model type
ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "phi3": Architecture(MODEL_ARCH.PHI3),
    "gemma2": Architecture(
        MODEL_ARCH.GEMMA2, **_GEMMA, tied=True, window_every=2, scaled_by_width=46
    ),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, **_GEMMA, window_every=6, scaled_by_width=62),
}


def add_model(writer: GGUFWriter, config: PretrainedConfig) -> dict[str, np.ndarray]:
    """Write the shapes and constants of a model.

    Returns:
        Tensors that the file must have besides the model's own, by name, float32.

    Raises:
        UserError: llama.cpp would compute something else than the config says.
    """
    architecture = ARCHITECTURES[config.model_type]
    _check(config, architecture)
    head_dim = head_dim_of(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture.window_every:
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    return _add_rope(writer, config, head_dim)


def head_dim_of(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length(config: PretrainedConfig) -> int:
    """Tokens within which llama.cpp computes what transformers does."""
    positions = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if not window or ARCHITECTURES[config.model_type].window_every:
        return positions
    if not getattr(config, "use_sliding_window", True):
        return positions
    return min(positions, window)


def _check(config: PretrainedConfig, architecture: Architecture) -> None:
    kind = config.model_type
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != architecture.activation:
        raise UserError(
            f"to_gguf: llama.cpp runs {kind} with {architecture.activation}, and this model has "
            f"{activation}"
        )
    if kind == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        raise UserError("to_gguf: llama.cpp caps the scores and logits of gemma2, this model not")
    if kind == "gemma3_text" and getattr(config, "attn_logit_softcapping", None):
        raise UserError("to_gguf: llama.cpp does not cap the scores of gemma3, this model does")
    if not architecture.window_every:
        return
    every = architecture.window_every
    expected = [
        "full_attention" if layer % every == every - 1 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if config.layer_types != expected:
        raise UserError(
            f"to_gguf: in llama.cpp every {every}th layer of {kind} attends to everything, and "
            f"this model's layers are {config.layer_types}"
        )
    width = config.num_hidden_layers == architecture.scaled_by_width
    scale = config.hidden_size // config.num_attention_heads if width else head_dim_of(config)
    if config.query_pre_attn_scalar != scale:
        raise UserError(
            f"to_gguf: llama.cpp scales the scores of this {kind} by {scale}**-0.5, and its "
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar}"
        )


def _add_rope(writer: GGUFWriter, config: PretrainedConfig, head_dim: int) -> dict[str, np.ndarray]:
    rope: dict[str, Any] = config.rope_parameters
    if "full_attention" in rope:  # by type of layer
        sliding = rope["sliding_attention"]
        if sliding.get("rope_type", "default") != "default":
            raise UserError("to_gguf: llama.cpp does not scale the positions of sliding layers")
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
        rope = rope["full_attention"]
    partial = rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(head_dim * partial))
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
        return {}
    if kind == "llama3":
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"
        return {name: _llama3_factors(rope, head_dim)}
    raise UserError(
        f"to_gguf: rotary embeddings of type {kind!r} cannot be written yet; "
        "there are: default, linear, llama3"
    )


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """What llama.cpp divides each frequency by, float32 (head_dim / 2,).

    Llama 3.1 leaves short waves as they are, stretches long ones by `factor`, and goes smoothly
    from one to the other between (transformers' `rope_type: llama3`).
    """
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    waves = 2 * math.pi / frequencies
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
