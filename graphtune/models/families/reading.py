"""Read the parts that most configs write alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig

from graphtune.errors import UserError
from graphtune.models.attention import AttentionOptions
from graphtune.models.feed_forward import Activation, FeedForwardOptions
from graphtune.models.norm import NormOptions
from graphtune.models.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, YarnRope
from graphtune.models.transformer import DecoderOptions, LayerOptions

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def decoder(
    config: PretrainedConfig, layers: Iterable[LayerOptions], **different: Any
) -> DecoderOptions:
    """Options of a Llama with these layers, but for what is `different`."""
    usual = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "layers": tuple(layers),
        "tied": config.tie_word_embeddings,
        "padding_id": config.pad_token_id,
    }
    if "norm" not in different:
        usual["norm"] = norm(config)
    return DecoderOptions(**usual | different)


def norm(config: PretrainedConfig, *, plus_one: bool = False) -> NormOptions:
    return NormOptions("rms", config.rms_norm_eps, plus_one)


def attention(config: PretrainedConfig, **different: Any) -> AttentionOptions:
    """Options of a Llama's attention, but for what is `different`."""
    if getattr(config, "use_bidirectional_attention", None):
        raise _unsupported("use_bidirectional_attention", True, "the decoder is causal")
    width = head_dim(config)
    usual = {
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": width,
        "scale": width**-0.5,
        "dropout": config.attention_dropout or 0.0,
    }
    if "rope" not in different:
        usual["rope"] = rope(config, config.rope_parameters)
    return AttentionOptions(**usual | different)


def head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def feed_forward(config: PretrainedConfig, **different: Any) -> FeedForwardOptions:
    """Options of a Llama's feed-forward part, but for what is `different`."""
    usual = {"size": config.intermediate_size, "activation": activation(config)}
    return FeedForwardOptions(**usual | different)


def activation(config: PretrainedConfig) -> Activation:
    key = "hidden_act" if hasattr(config, "hidden_act") else "hidden_activation"
    name = getattr(config, key)
    if name not in _ACTIVATIONS:
        raise _unsupported(key, name, f"known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def windows(config: PretrainedConfig) -> list[int | None]:
    """The window of each layer, where `layer_types` says which have one."""
    unknown = set(config.layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        known = "known: full_attention, sliding_attention"
        raise _unsupported("layer_types", sorted(unknown)[0], known)
    return [
        config.sliding_window if kind == "sliding_attention" else None
        for kind in config.layer_types
    ]


def rope(config: PretrainedConfig, parameters: Mapping[str, Any]) -> Rope:
    """Rotary positions from `rope_parameters`, or from its part for one kind of layer.

    Raises:
        UserError: a `rope_type` that is not known.
    """
    kind = parameters["rope_type"]
    dim = int(head_dim(config) * parameters.get("partial_rotary_factor", 1.0))
    plain: dict[str, Any] = {"dim": dim, "theta": parameters["rope_theta"]}
    if kind == "default":
        return Rope(**plain)
    if kind == "linear":
        return LinearRope(**plain, factor=parameters["factor"])
    if kind == "dynamic":
        length = config.max_position_embeddings
        return DynamicRope(**plain, factor=parameters["factor"], length=length)
    if kind not in ("llama3", "yarn", "longrope"):
        known = "known: default, linear, dynamic, llama3, yarn, longrope"
        raise _unsupported("rope_type", kind, known)
    length = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or config.max_position_embeddings / length
    plain |= {"original_length": length}
    if kind == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        return Llama3Rope(**plain, factor=factor, low=low, high=high)
    amplitude = parameters.get("attention_factor")
    if kind == "yarn":
        return YarnRope(
            **plain,
            factor=factor,
            amplitude=_yarn_amplitude(parameters, factor) if amplitude is None else amplitude,
            fast=parameters.get("beta_fast") or 32,
            slow=parameters.get("beta_slow") or 1,
            truncate=parameters.get("truncate", True),
        )
    if amplitude is None:
        amplitude = math.sqrt(1 + max(0.0, math.log(factor)) / math.log(length))
    return LongRope(
        **plain,
        amplitude=amplitude,
        short_factors=tuple(parameters["short_factor"]),
        long_factors=tuple(parameters["long_factor"]),
    )


def _yarn_amplitude(parameters: Mapping[str, Any], factor: float) -> float:
    """The paper's 0.1 ln(factor) + 1, or DeepSeek's ratio of two of that kind."""

    def grown(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return grown(over) / grown(under) if over and under else grown(1.0)


def _unsupported(key: str, value: Any, hint: str) -> UserError:
    return UserError(
        f"model.implementation: graphtune's decoder has no {key}={value!r} ({hint}); "
        "use implementation 'transformers'"
    )
