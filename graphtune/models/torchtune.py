"""Checkpoints in torchtune's own layout.

torchtune's recipes write Hugging Face's layout as a rule. With `FullModelTorchTuneCheckpointer`
they write their own names, and up to version 0.4 all names of files were torchtune's. None of them
says what model it is of, so that a folder needs the base model's `config.json` besides.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from graphtune.errors import UserError
from graphtune.models.checkpoints import TorchFiles, own, to_half_rotation

# torchtune turns neighbouring channels of queries and keys, as Meta does, but for models that it
# got later, where it kept Hugging Face's order of rows.
_INTERLEAVED = ("gemma", "gemma2", "llama", "mistral")
_HALVES = ("phi3", "qwen2", "qwen3")

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "norm.rms_norm.scale": "model.norm.weight",  # Gemma 2, whose last norm also caps
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "sa_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
_CHANGES = {
    "gemma2": {  # norms before and after
        "sa_scale": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_scale": "post_feedforward_layernorm",
    },
    "phi3": {  # one projection; torchtune has the parts
        "attn.q_proj": "self_attn.qkv_proj",
        "attn.k_proj": "self_attn.qkv_proj",
        "attn.v_proj": "self_attn.qkv_proj",
        "mlp.w1": "mlp.gate_up_proj",
        "mlp.w3": "mlp.gate_up_proj",
    },
}
_ORDER = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.w1", "mlp.w3")  # of fused parts

_PART = re.compile(r"(?:ft-)?model-(\d+)-of-(\d+)\.bin")
_EPOCH = re.compile(r"(?:torchtune_|meta_)?model_(\d+)\.pt")
_EPOCH_PART = re.compile(r"hf_model_(\d+)_(\d+)\.pt")


def torchtune_files(folder: Path) -> list[Path]:
    """Files of weights under names that torchtune gave them; none if there are no such.

    Raises:
        UserError: one of several parts is missing, or there are several epochs.
    """
    parts: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _PART.fullmatch(path.name):
            parts.setdefault(f"of {int(match[2])}", {})[int(match[1])] = path
        elif match := _EPOCH_PART.fullmatch(path.name):
            parts.setdefault(f"epoch {match[2]}", {})[int(match[1])] = path
        elif _EPOCH.fullmatch(path.name):
            parts.setdefault(path.name, {})[1] = path
    if not parts:
        return []
    if len(parts) > 1:
        raise UserError(
            f"model.id: the folder {str(folder)!r} holds several of torchtune's checkpoints "
            f"({', '.join(sorted(parts))}); put one, with its config.json, in a folder of its own"
        )
    ((kind, found),) = parts.items()
    count = int(kind.removeprefix("of ")) if kind.startswith("of ") else max(found)
    missing = sorted(set(range(1, count + 1)) - found.keys())
    if missing:
        raise UserError(
            f"model.id: the folder {str(folder)!r} lacks part {missing[0]} of {count} of "
            "torchtune's checkpoint; copy all parts into it"
        )
    return [found[index] for index in sorted(found)]


def is_torchtune(names: Iterable[str]) -> bool:
    """Whether tensors have torchtune's names, rather than Meta's or Hugging Face's."""
    return any(name.endswith(".sa_norm.scale") for name in names)


class Torchtune:
    """A `Checkpoint` over torchtune's files: Hugging Face's names and order of rows, parts fused.

    Args:
        files: torchtune's.
        config: of the model that they are of.
        folder: where they are, for messages.

    Raises:
        UserError: a model that torchtune's layout cannot be read of, or another tensor than its.
    """

    def __init__(self, files: TorchFiles, config: PretrainedConfig, folder: Path) -> None:
        known = (*_INTERLEAVED, *_HALVES)
        if config.model_type not in known:
            raise UserError(
                f"model.id: {str(folder)!r} is in torchtune's layout, and config.json is of the "
                f"model type {config.model_type!r}; that layout can be read of {', '.join(known)}"
            )
        if config.model_type == "gemma2":
            # https://github.com/pytorch/torchtune/pull/2853
            warnings.warn(
                f"{folder}: torchtune up to 0.6.1 swapped two norms of Gemma 2 and no name tells; "
                "if that version wrote these weights, let it write Hugging Face's layout instead",
                stacklevel=2,
            )
        self.files = files
        self.config = config
        self.parts_of: dict[str, list[str]] = {}
        for name in sorted(files.names(), key=_place):
            self.parts_of.setdefault(_translate(name, config.model_type, folder), []).append(name)

    def names(self) -> Collection[str]:
        return self.parts_of.keys()

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        parts = [self.files.tensors[part] for part in self.parts_of[name]]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        is_turned = name.endswith(("q_proj.weight", "k_proj.weight"))
        if is_turned and self.config.model_type in _INTERLEAVED:
            whole = to_half_rotation(whole, self.config, name)
        return own(whole, dtype)

    def close(self) -> None:
        self.files.close()


def _place(name: str) -> int:
    """Where a part comes in a fused tensor."""
    return next((i for i, part in enumerate(_ORDER) if f".{part}." in name), 0)


def _translate(name: str, model_type: str, folder: Path) -> str:
    if name in _TOP:
        return _TOP[name]
    layer = _LAYER | _CHANGES.get(model_type, {})
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias|scale)", name)
    if match is None or match[2] not in layer:
        adapter = ".lora_" in name or name.endswith(".magnitude")
        raise UserError(
            f"model.id: torchtune's weights in {str(folder)!r} have {name!r}, which "
            + (
                "is of an adapter; give the merged weights"
                if adapter
                else f"a {model_type} has not; is the config.json that of another model?"
            )
        )
    leaf = "bias" if match[3] == "bias" else "weight"
    return f"model.layers.{match[1]}.{layer[match[2]]}.{leaf}"
