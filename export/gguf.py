"""A merged model as a GGUF file, which llama.cpp and what is built on it run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from graphtune.config import did_you_mean
from graphtune.errors import UserError
from graphtune.export.artifact import Artifact, artifact, evaluating, logits, probe_ids
from graphtune.export.gguf_check import check_config, check_llama_cpp, check_tokenizer, load_with
from graphtune.export.gguf_metadata import (
    ARCHITECTURES,
    Architecture,
    add_model,
    context_length,
)
from graphtune.export.gguf_tokenizer import add_tokenizer
from graphtune.export.hf import check_mergeable, second_names

MODEL = "model.gguf"
FORMATS = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_EXACT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_Q8_BLOCK = 32

# llama.cpp rounds what a matrix is multiplied with to the matrix's own format, and looks GELU up
# in a table of float16. For q8_0 a tenth of the largest logit, as where `Convert` rounds inputs.
_LLAMA_CPP = {"f32": 1e-3, "f16": 2e-2, "bf16": 0.2, "q8_0": 1.0}
_LLAMA_CPP_GELU = 2e-2


def to_gguf(
    program: nn.Module,
    out_dir: str | Path,
    *,
    format: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    run: str | None = None,
) -> Path:
    """Write `model.gguf`, load it again through transformers and compare its logits.

    Where llama-cpp-python is installed, llama.cpp runs the file too. Vectors, such as the weights
    of norms, are float32 in every format. llama.cpp has no sliding window for Mistral, Qwen 2 and
    Phi 3: the file says that their context is at most the window, within which they are the same.

    Args:
        program: of one of the model types in `ARCHITECTURES`, adapters merged.
        out_dir: must be missing or empty; gets `model.gguf` and `manifest.json`.
        format: of the matrices: `f32`, `f16`, `bf16` or `q8_0` (8.5 bits: blocks of 32 weights
            with a scale); None is the program's own dtype, in which nothing is lost.
        tokenizer: written into the file; without one, llama.cpp takes ids only.
        tolerance: largest difference of a logit to the program with the weights rounded, where
            logits reach 10 or less; None: 1e-4 for a float32 program. The difference to the
            program as it is, which rounding makes, is measured and kept in the manifest.
        overwrite, run: see `graphtune.export.artifact.artifact`.

    Returns:
        The folder.

    Raises:
        UserError: `out_dir` holds something; llama.cpp has no form for the model or for the
            tokenizer; adapters are not merged, or weights quantized.
        RuntimeError: the logits, or the ids of the tokenizer, of the file are others.
    """
    state = program.state_dict()
    check_mergeable(program, state)
    if format is None:
        format = _EXACT[next(program.parameters()).dtype]
    if format not in FORMATS:
        raise UserError(f"to_gguf: `format={format}` is unknown{did_you_mean(format, FORMATS)}")
    config = _config_of(program)
    tensors = list(_tensors(state, config, format))
    packages = ("torch", "transformers", "gguf")
    with artifact(
        out_dir, "gguf", program, packages=packages, overwrite=overwrite, run=run
    ) as made:
        made.facts["format"] = format
        path = made.path / MODEL
        _write(path, program, config, tensors, tokenizer, FORMATS[format][1])
        made.facts["not_read_by_transformers"] = check_config(path, config)
        _check_logits(made, path, program, tensors, format, tokenizer, tolerance)
        if tokenizer is not None:
            check_tokenizer(path, tokenizer)
    return Path(out_dir)


def _config_of(program: nn.Module) -> PretrainedConfig:
    config = getattr(program, "config", None)
    config = config.get_text_config() if config is not None else None
    kind = getattr(config, "model_type", None)
    if config is None or kind not in ARCHITECTURES:
        raise UserError(
            f"to_gguf: models of type {kind!r} cannot be written yet; "
            f"there are: {', '.join(ARCHITECTURES)}"
        )
    return config


# ---------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file.

    Attributes:
        name: in the file.
        source: in the program.
        weight: the program's.
        kind: how it is stored.
        heads: of a weight whose rows are permuted within each of so many heads, or 0.
        offset: what the file adds to each value.
    """

    name: str
    source: str
    weight: Tensor
    kind: GGMLQuantizationType
    heads: int
    offset: float

    def values(self) -> np.ndarray:
        """As llama.cpp computes with them, float32."""
        weight = self.weight.detach().cpu().float()
        if self.heads:
            weight = _interleave(weight, self.heads)
        return (weight + self.offset).numpy() if self.offset else weight.numpy()

    def stored(self) -> np.ndarray:
        return np.ascontiguousarray(gguf.quantize(np.ascontiguousarray(self.values()), self.kind))

    def rounded(self) -> Tensor:
        """The program's weight as the file keeps it."""
        weight = torch.from_numpy(np.array(gguf.dequantize(self.stored(), self.kind)))
        if self.offset:
            weight = weight - self.offset
        weight = _interleave(weight, self.heads, undo=True) if self.heads else weight
        return weight.view(self.weight.shape).to(self.weight)


def _tensors(state: dict[str, Tensor], config: PretrainedConfig, format: str) -> Iterator[_Entry]:
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture.kind, config.num_hidden_layers)
    second = set(second_names(state))
    if architecture.tied and "lm_head.weight" in state.keys() - second:
        raise UserError(
            f"to_gguf: llama.cpp ties the output head of {config.model_type} to its embedding, and "
            "this program's head is its own; leave the head out of what trains"
        )
    for source, weight in state.items():
        if source in second:
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"to_gguf: llama.cpp has no tensor for {source} ({config.model_type})")
        yield _Entry(
            name=name,
            source=source,
            weight=weight,
            kind=_kind_of(weight, format),
            heads=_permuted_heads(source, config, architecture),
            offset=architecture.norm_offset if source.endswith("norm.weight") else 0.0,
        )


def _kind_of(weight: Tensor, format: str) -> GGMLQuantizationType:
    if weight.dim() < 2:
        return GGMLQuantizationType.F32
    if format == "q8_0" and weight.shape[-1] % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return FORMATS[format][0]


def _permuted_heads(source: str, config: PretrainedConfig, architecture: Architecture) -> int:
    module = source.rpartition(".")[0]
    if not architecture.interleaved or not module.endswith(("q_proj", "k_proj")):
        return 0
    return config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads


def _interleave(weight: Tensor, heads: int, *, undo: bool = False) -> Tensor:
    """Reorder rows: transformers rotates the halves of a head, llama.cpp neighbours (RoFormer)."""
    half = weight.shape[0] // heads // 2
    parts = (half, 2) if undo else (2, half)
    return weight.reshape(heads, *parts, -1).transpose(1, 2).reshape(weight.shape)


def _write(
    path: Path,
    program: nn.Module,
    config: PretrainedConfig,
    tensors: list[_Entry],
    tokenizer: PreTrainedTokenizerBase | None,
    file_type: LlamaFileType,
) -> None:
    architecture = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture.kind])
    try:
        # Not the bare source: transformers takes a llama file named "mistral" for another type.
        writer.add_name(f"{getattr(program, 'source', None) or config.model_type}, fine-tuned")
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        extra = add_model(writer, config)
        if tokenizer is not None:
            add_tokenizer(writer, tokenizer, config.vocab_size, _stop_ids(program))
        else:
            writer.add_tokenizer_model("none")
        for name in ("bos", "eos", "unk", "pad"):
            for source in (tokenizer, config):
                index = getattr(source, f"{name}_token_id", None)
                if isinstance(index, int):
                    getattr(writer, f"add_{name}_token_id")(index)
                    break
        for name, values in extra.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for entry in tensors:
            shape = tuple(entry.weight.shape)
            size = gguf.quant_shape_to_byte_shape(shape, entry.kind)
            writer.add_tensor_info(
                entry.name, shape, np.dtype(np.float32), math.prod(size), raw_dtype=entry.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in extra.values():
            writer.write_tensor_data(values)
        for entry in tensors:  # one at a time: a large model is never there twice
            with np.errstate(over="ignore"):
                stored = entry.stored()
            if entry.kind == GGMLQuantizationType.F16 and not np.isfinite(stored).all():
                raise UserError(
                    f"to_gguf: `format=f16`: {entry.source} has values beyond the range of "
                    "float16; choose bf16 or f32"
                )
            writer.write_tensor_data(stored)
    finally:
        writer.close()


def _stop_ids(program: nn.Module) -> list[int]:
    for source in (getattr(program, "generation_config", None), getattr(program, "config", None)):
        ids: Any = getattr(source, "eos_token_id", None)
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []


# ---------------------------------------------------------------------------- verification


def _check_logits(
    made: Artifact,
    path: Path,
    program: nn.Module,
    tensors: list[_Entry],
    format: str,
    tokenizer: PreTrainedTokenizerBase | None,
    tolerance: float | None,
) -> None:
    config = _config_of(program)
    ids = probe_ids(program, tokenizer, length=min(32, context_length(config)))
    weights = {entry.source: entry.rounded() for entry in tensors}
    device = next(program.parameters()).device
    with evaluating(program):
        rounded = functional_call(program, weights, (ids.to(device),))
    rounded = getattr(rounded, "logits", rounded)
    del weights
    loaded: nn.Module = load_with(path, program)
    loaded.to(device)
    found = logits(loaded, ids)
    del loaded
    made.check("transformers, to the program rounded", found, rounded, tolerance)
    if find_spec("llama_cpp") is not None:
        check_llama_cpp(made, path, ids, rounded, _llama_cpp_tolerance(config, format))
    if format != _EXACT[next(program.parameters()).dtype]:
        made.measure(f"what {format} loses", found, logits(program, ids))


def _llama_cpp_tolerance(config: PretrainedConfig, format: str) -> float:
    gelu = "gelu" in ARCHITECTURES[config.model_type].activation
    return max(_LLAMA_CPP[format], _LLAMA_CPP_GELU if gelu else 0.0)
