"""GGUF files: the config, the de-quantised weights and a faithful tokenizer.

transformers reads all three, with gaps that show up later as wrong ids or a model that
refuses to train. This module closes them; each function says which.
"""

from __future__ import annotations

import copy
import functools
import json
import struct
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf import (
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
    is_gguf_arch_supported,
    read_gguf_metadata,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    Gemma2TensorProcessor,
    LlamaTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from graphtune.errors import UserError

# Two copies of a tied embedding differ by their quantization errors: about 0.1 relative at
# 4 bits, 0.3 at 2. Embeddings that are not tied are unrelated: 1 or more.
_TIED_DIFFERENCE = 0.5
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


class Metadata(NamedTuple):
    """What a GGUF file says about itself: key-value pairs and the names of its tensors."""

    fields: dict[str, Any]
    tensors: tuple[str, ...]


def read_metadata(path: Path) -> Metadata:
    """Read a GGUF header without its vocabulary or tensors: milliseconds, whatever the size.

    Raises:
        UserError: the file is not GGUF, or damaged.
    """
    try:
        return Metadata(*read_gguf_metadata(str(path)))
    except (ValueError, struct.error) as error:
        raise UserError(
            f"model.id: {str(path)!r} is not a readable GGUF file ({error}); download it again"
        ) from error


def load_gguf_config(path: Path) -> PretrainedConfig:
    """The model's config, from the file's metadata.

    The first call for a file takes seconds (transformers walks the whole vocabulary), the
    next ones nothing.
    """
    return copy.deepcopy(_read_config(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _read_config(path: Path, modified_ns: int) -> PretrainedConfig:
    read_metadata(path)  # a damaged file is refused here, with a clear message
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    assert isinstance(config, PretrainedConfig)
    return config


def load_gguf_model(path: Path, dtype: torch.dtype | str, **options: Any) -> PreTrainedModel:
    """The model with all weights de-quantised to `dtype` ("auto": float32 where quantised).

    `dequantize=True` is what makes transformers hand back a plain model: without it a
    quantizer stays attached and both training and `save_pretrained` refuse. `options` are others of
    `from_pretrained`.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=load_gguf_config(path),
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        **options,
    )
    ties = getattr(model.config, "tie_word_embeddings", False)
    if not ties and (better := better_embedding(path)):
        _tie_embeddings(model, take_output=better == _OUTPUT)
    return model


def _tie_embeddings(model: PreTrainedModel, *, take_output: bool) -> None:
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert isinstance(embedding, torch.Tensor) and isinstance(output, torch.Tensor)
    if take_output:
        with torch.no_grad():
            embedding.copy_(output)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    # What `save_pretrained` consults, so that it writes the shared tensor once.
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def better_embedding(path: Path) -> str | None:
    """The more precise of two copies of one embedding, by its name in the file; None if it has one.

    llama.cpp may write `output.weight` beside `token_embd.weight` for a model that ties them, and
    transformers then takes the model for an untied one.
    """
    if _OUTPUT not in read_metadata(path).tensors:
        return None
    tensors = {t.name: t for t in GGUFReader(path).tensors if t.name in (_EMBEDDING, _OUTPUT)}
    if len(tensors) < 2 or len({tuple(t.shape) for t in tensors.values()}) > 1:
        return None
    sample, other = (_some_rows(tensors[name]) for name in (_EMBEDDING, _OUTPUT))
    if (sample - other).norm() > _TIED_DIFFERENCE * sample.norm():
        return None
    is_better = tensors[_OUTPUT].n_bytes > tensors[_EMBEDDING].n_bytes
    return _OUTPUT if is_better else _EMBEDDING


def _some_rows(tensor: ReaderTensor) -> torch.Tensor:
    """Values of up to about 4,096 rows, which tell as much as all."""
    rows = tensor.data[:: max(1, len(tensor.data) // 4096)]
    return torch.from_numpy(dequantize(rows, tensor.tensor_type)).float()


class GgufFile:
    """A `Checkpoint` over a GGUF file: the model's names, each tensor de-quantised when it is read.

    Args:
        path: of the file.
        model: that the weights are for, on any device; says what names it has.
        processor: of transformers; undoes what llama.cpp does to tensors of an architecture.
    """

    def __init__(self, path: Path, model: PreTrainedModel, processor: TensorProcessor) -> None:
        tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        if better := better_embedding(path):
            tensors |= dict.fromkeys((_EMBEDDING, _OUTPUT), tensors[better])
        translated = get_gguf_hf_weights_map(model, processor)
        self._processor = processor
        self._sources: dict[str, tuple[str, ReaderTensor]] = {
            translated.get(name, name): (name, tensor) for name, tensor in tensors.items()
        }

    def names(self) -> Collection[str]:
        return self._sources.keys()

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        source, tensor = self._sources[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        values = self._processor.process(weights=values, name=source).weights
        # Values that are stored as such are still the mapped file, which cannot be written to.
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(dtype)

    def close(self) -> None:
        self._sources = {}


def open_gguf(path: Path, model: PreTrainedModel) -> GgufFile | None:
    """A GGUF file to read one tensor at a time; None if only `load_gguf_model` can.

    Raises:
        UserError: the file is not GGUF, or damaged.
    """
    architecture = read_metadata(path).fields["general.architecture"]
    kind = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    # Others make several tensors of one, or one of several; these of one, one. transformers reads
    # some architectures with other code, and has no processors for them.
    one_to_one = (TensorProcessor, LlamaTensorProcessor, Gemma2TensorProcessor)
    if kind not in one_to_one or is_gguf_arch_supported(architecture):
        return None
    return GgufFile(path, model, kind(config=model.config.to_dict()))


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, with the steps before the merges that its vocabulary was trained with.

    transformers rebuilds vocabulary, merges, special tokens and chat template, but not every
    step before the merges; `tokenizer.ggml.pre` names the family, `_REPAIRS` what it lacks.
    Byte-level families that are not in that table warn: their ids may differ from the model's.
    """
    read_metadata(path)  # a damaged file is refused here, with a clear message
    architecture, content, settings = get_gguf_tokenizer(str(path))
    backend, _ = convert_gguf_tokenizer(architecture, content)
    backend = _without_foreign_tokens(backend, len(content["tokens"]))
    if content.get("tokenizer_type") == "gpt2":  # byte-level BPE; only it has families
        family = content.get("pre_tokenizer_type", "default")
        if family in _REPAIRS:
            _REPAIRS[family](backend)
        else:
            warnings.warn(
                f"{path.name}: GGUF pre-tokenizer {family!r} has not been checked against its "
                "original tokenizer, some text may split differently; load the tokenizer from "
                "the model's own folder or hub id to be sure",
                stacklevel=2,
            )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    tokenizer.name_or_path = str(path)  # as an argument, the hub would be asked for it
    return tokenizer


def _without_foreign_tokens(tokenizer: Tokenizer, vocabulary_size: int) -> Tokenizer:
    """Drop added tokens that the file does not have.

    transformers adds GPT-2's `<|endoftext|>` to every byte-level vocabulary; where the model has
    no such token (Llama 3), its id lies beyond the embedding.
    """
    added = tokenizer.get_added_tokens_decoder()
    if all(token_id < vocabulary_size for token_id in added):
        return tokenizer
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < vocabulary_size]
    return Tokenizer.from_str(json.dumps(content))


def _faithful(tokenizer: Tokenizer) -> None:
    """GPT-2's own pre-tokenizer: transformers rebuilds it as it was."""


def _single_digits(tokenizer: Tokenizer) -> None:
    """Every digit is a token of its own."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _nfc(tokenizer: Tokenizer) -> None:
    """Text is brought to Unicode's composed form first."""
    tokenizer.normalizer = normalizers.NFC()


def _whole_words_first(tokenizer: Tokenizer) -> None:
    """A piece that is in the vocabulary is taken as it is, even where no merges lead to it."""
    tokenizer.model.ignore_merges = True


# By `tokenizer.ggml.pre`; families that share a pre-tokenizer share llama.cpp's case
# (src/llama-vocab.cpp), steps are those of the official tokenizer.json files.
_REPAIRS: dict[str, Callable[[Tokenizer], None]] = {
    "gpt-2": _faithful,
    "phi-2": _faithful,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,
    "qwen2": _nfc,
    "qwen35": _nfc,
    "llama3": _whole_words_first,
    "llama-v3": _whole_words_first,
    "llama-bpe": _whole_words_first,
    "tekken": _whole_words_first,
}
