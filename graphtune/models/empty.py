"""Models without weights, and our decoder over the weights of another class."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from graphtune.models.families import build_model
from graphtune.models.transformer import Transformer


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that makes and loads the models of a config."""
    kind = config.model_type
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:  # some take images, and are in no other
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def empty_model(
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    *,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> Any:
    """A model whose parameters are on the meta device and whose buffers are real, on the CPU.

    Args:
        config: stays as it is; the model gets a copy.
        dtype: of the parameters; "auto" is what the config says, float32 where it says nothing.
            Those that transformers loads in float32 whatever was asked for are float32.
        trust_remote_code: let the hub repository's own Python code run.
        attn_implementation: "sdpa" or "eager"; None is the config's, or sdpa where the class can.
    """
    config = copy.deepcopy(config)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    chosen = (config.dtype or torch.float32) if dtype == "auto" else dtype
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        model: Any = auto_class(config).from_config(
            config, dtype=chosen, trust_remote_code=trust_remote_code
        )
    kept = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(chosen)]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(re.search(pattern, name) for pattern in kept):
            tensor.data = tensor.data.float()
    model.tie_weights()  # a parameter that is set twice is two parameters to accelerate
    return model


def as_ours(model: Any) -> Transformer:
    """Our decoder over the weights of a transformers model, which it shares.

    transformers reads the checkpoint whichever implementation is asked for: it knows all layouts
    that weights were ever saved in.
    """
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        ours = build_model(model.config)
    ours.load_state_dict(model.state_dict(), assign=True)
    ours.tie_weights()
    return ours


def move_buffers_aside(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Put all buffers on the meta device; returns those that no checkpoint holds, as they were."""
    saved = model.state_dict().keys()
    aside = {}
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to("meta"))
        if name not in saved:
            aside[name] = buffer
    return aside
