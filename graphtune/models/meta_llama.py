"""Llama as Meta ships it: `params.json` and `consolidated.00.pth`, `consolidated.01.pth`, ...

Two things differ from Hugging Face's layout besides names. The rows of query and key projections
lie in another order: Meta turns pairs of neighbouring channels, Hugging Face a channel with the one
half a head further on. And a large model is cut for tensor parallelism, into as many files as there
were devices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from graphtune.errors import UserError
from graphtune.models.checkpoints import own, read_torch_file, to_half_rotation
from graphtune.models.torchtune import torchtune_files

PARAMS = "params.json"
_SHAPES = {"dim", "n_layers", "n_heads"}
_DEFAULTS: dict[str, Any] = {
    "n_kv_heads": None,  # as many as n_heads
    "vocab_size": -1,  # what the tokenizer has; here: what the embedding has
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "use_scaled_rope": False,
    "rope_scaling_factor": None,  # 32 in small models of Llama 3.2, else 8
    "rope_high_freq_factor": 4.0,
    "max_seq_len": None,  # of Meta's generator, no property of the model
    "max_batch_size": None,
}

# Meta's name: (Hugging Face's name, the axis along which files are parts). An embedding is cut
# along columns up to Llama 2 and along rows since; norms are in every file.
_TOP = {
    "tok_embeddings": ("model.embed_tokens", 0),
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
}
_LAYER = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}


def is_meta_folder(folder: Path) -> bool:
    """Whether a folder is in Meta's layout; one that has a `config.json` is in Hugging Face's."""
    return (folder / PARAMS).is_file() and not (folder / "config.json").is_file()


def has_meta_files(folder: Path) -> bool:
    """Whether a folder's weights are Meta's, whatever the folder has besides."""
    return is_meta_folder(folder) or any(folder.glob("consolidated.*.pth"))


def tokenizer_family(file: Path) -> str:
    """Which of Llama's tokenizers Meta's `tokenizer.model` is, as `load_raw_tokenizer` calls them.

    A sentencepiece model (up to Llama 2) is a message of protobuf, which begins with the tag of its
    first field; ranks for tiktoken (from Llama 3 on) are text.
    """
    with file.open("rb") as opened:
        return "llama2" if opened.read(1) == b"\n" else "llama3"


def load_meta_config(folder: Path) -> LlamaConfig:
    """The config that `params.json` means.

    What it does not say is taken from the weights (whose values are not read, but for a few rows):
    the dtype, a vocabulary of -1, and whether the output is the embedding. Meta stores it twice.

    Raises:
        UserError: `params.json` is damaged, lacks a key, or has one that is of no text model; or
            the weights are missing or damaged.
    """
    params = _read_params(folder / PARAMS)
    files = _files(folder)
    first = read_torch_file(files[0])
    embedding = _present(first, "tok_embeddings.weight", files[0])
    dim, heads = params["dim"], params["n_heads"]
    if dim % heads:
        raise _bad_params(folder / PARAMS, f"dim {dim} is no multiple of n_heads {heads}")
    vocabulary = params["vocab_size"]
    if vocabulary <= 0:
        cut = len(files) if embedding.shape[-1] == dim else 1
        vocabulary = embedding.shape[0] * cut
    tied = _is_tied(embedding, first.get("output.weight"))
    is_llama3 = vocabulary >= 128_256
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=_intermediate_size(params),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=params["n_kv_heads"] or heads,
        max_position_embeddings=_max_positions(params),
        rms_norm_eps=params["norm_eps"],
        rope_parameters=_rope(params, tied),
        tie_word_embeddings=tied,
        bos_token_id=128_000 if is_llama3 else 1,
        eos_token_id=128_001 if is_llama3 else 2,
        dtype=embedding.dtype,
        architectures=["LlamaForCausalLM"],
    )


def _read_params(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _bad_params(path, f"it cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise _bad_params(path, f"it holds a {type(given).__name__}, not a mapping")
    if missing := sorted(_SHAPES - given.keys()):
        raise _bad_params(path, f"it lacks {missing[0]!r}")
    if unknown := sorted(given.keys() - _SHAPES - _DEFAULTS.keys()):
        raise _bad_params(
            path, f"{unknown[0]!r} is no option of a plain text Llama, and no other can be read"
        )
    for key, value in given.items():
        optional = _DEFAULTS.get(key, 0) is None and value is None
        if not optional and not isinstance(value, int | float):
            raise _bad_params(path, f"{key} must be a number, not {value!r}")
    return _DEFAULTS | given


def _bad_params(path: Path, reason: str) -> UserError:
    return UserError(f"model.id: {str(path)!r} is not Meta's: {reason}")


def _intermediate_size(params: Mapping[str, Any]) -> int:
    """Two thirds of four times the width, times a factor, up to a multiple."""
    size = int(8 * params["dim"] / 3)
    if params["ffn_dim_multiplier"] is not None:
        size = int(params["ffn_dim_multiplier"] * size)
    multiple = params["multiple_of"]
    return multiple * -(-size // multiple)


def _max_positions(params: Mapping[str, Any]) -> int:
    """As Hugging Face's config of the same model says; `params.json` does not."""
    if params["use_scaled_rope"]:
        return 131_072  # 3.1 to 3.3
    by_base = {500_000.0: 8192, 1_000_000.0: 16_384}  # 3; Code Llama
    first = 2048 if params["norm_eps"] == 1e-6 else 4096  # 1; 2
    return by_base.get(params["rope_theta"], first)


def _rope(params: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    base = {"rope_theta": float(params["rope_theta"])}
    if not params["use_scaled_rope"]:
        return {"rope_type": "default"} | base
    # Only the 1B and 3B of Llama 3.2 are scaled 32 times, and only they tie their embeddings.
    factor = params["rope_scaling_factor"] or (32.0 if tied else 8.0)
    return base | {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(params["rope_high_freq_factor"]),
        "original_max_position_embeddings": 8192,
    }


def _is_tied(embedding: Tensor, output: Tensor | None) -> bool:
    if output is None:
        return True
    rows = slice(None, None, max(1, len(embedding) // 64))  # a sample tells as much as all
    return embedding.shape == output.shape and torch.equal(embedding[rows], output[rows])


def _files(folder: Path) -> list[Path]:
    """The checkpoint's files in order: Meta's, or what torchtune wrote in Meta's layout."""
    found = {
        int(match[1]): path
        for path in folder.glob("consolidated.*.pth")
        if (match := re.fullmatch(r"consolidated\.(\d+)\.pth", path.name))
    }
    for index in range(max(found, default=-1)):
        if index not in found:
            raise UserError(
                f"model.id: the folder {str(folder)!r} lacks consolidated.{index:02}.pth, but has "
                "later ones; download it again"
            )
    files = [found[index] for index in sorted(found)] or torchtune_files(folder)
    if not files:
        raise UserError(
            f"model.id: the folder {str(folder)!r} has {PARAMS} but no consolidated.00.pth; "
            "download Meta's weights again"
        )
    return files


def _present(tensors: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in tensors:
        raise UserError(f"model.id: {str(path)!r} has no {name!r}, so it is not Meta's Llama")
    return tensors[name]


class MetaLlama:
    """A `Checkpoint` over Meta's files: Hugging Face's names, whole tensors, its order of rows.

    Args:
        folder: that holds the files.
        config: of the model; says how many heads there are.

    Raises:
        UserError: the files have other tensors than a Llama, or do not belong together.
    """

    def __init__(self, folder: Path, config: LlamaConfig) -> None:
        files = _files(folder)
        self.config = config
        self.folder = folder
        self.shards = [read_torch_file(path) for path in files]
        for path, shard in zip(files, self.shards, strict=True):
            if different := shard.keys() ^ self.shards[0].keys():
                raise UserError(
                    f"model.id: {str(path)!r} and {files[0].name} do not belong together: only "
                    f"one of them has {min(different)!r}"
                )
        self.source_of: dict[str, tuple[str, int | None]] = {}
        for name in self.shards[0]:
            if not name.endswith("rope.freqs"):  # Llama 1 and 2 store what is computed
                translated, axis = _translate(name, folder)
                self.source_of[translated] = name, axis
        self._check_count()

    def _check_count(self) -> None:
        """Refuse when the last files are missing, which no name tells."""
        name = "layers.0.attention.wq.weight"
        rows = sum(len(_present(shard, name, self.folder)) for shard in self.shards)
        if rows != self.config.hidden_size:
            raise UserError(
                f"model.id: the {len(self.shards)} file(s) in {str(self.folder)!r} hold {rows} of "
                f"the {self.config.hidden_size} rows of {name!r}; download those that are missing"
            )

    def names(self) -> Collection[str]:
        return self.source_of.keys()

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        source, axis = self.source_of[name]
        parts = [shard[source] for shard in self.shards]
        if source.startswith("tok_embeddings") and parts[0].shape[-1] != self.config.hidden_size:
            axis = 1
        whole = self._join(source, parts, axis)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            whole = to_half_rotation(whole, self.config, name)
        return own(whole, dtype)

    def _join(self, source: str, parts: Sequence[Tensor], axis: int | None) -> Tensor:
        if axis is None or len(parts) == 1:
            return parts[0]
        rest = {tuple(part.select(axis, 0).shape) if part.dim() == 2 else None for part in parts}
        if len(rest) > 1 or None in rest:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise UserError(
                f"model.id: the parts of {source!r} in {str(self.folder)!r} do not fit together: "
                f"{shapes}"
            )
        return torch.cat(list(parts), dim=axis)

    def close(self) -> None:
        self.shards = []


def _translate(name: str, folder: Path) -> tuple[str, int | None]:
    """Hugging Face's name of a tensor, and the axis along which it is cut."""
    if (stem := name.removesuffix(".weight")) in _TOP:
        translated, axis = _TOP[stem]
        return f"{translated}.weight", axis
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if match is None or match[2] not in _LAYER:
        raise UserError(
            f"model.id: the weights in {str(folder)!r} have {name!r}, which a plain text Llama has "
            "not; adapters, vision, mixtures and quantized weights cannot be read in this layout"
        )
    translated, axis = _LAYER[match[2]]
    return f"model.layers.{match[1]}.{translated}.weight", axis
