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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gguf import GGUFReader
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
    read_gguf_metadata,
)

from graphtune.errors import UserError

# Two copies of a tied embedding differ by their quantization errors: about 0.1 relative at
# 4 bits, 0.3 at 2. Embeddings that are not tied are unrelated: 1 or more.
_TIED_DIFFERENCE = 0.5


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


def load_gguf_model(path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model with all weights de-quantised to `dtype` ("auto": float32 where quantised).

    `dequantize=True` is what makes transformers hand back a plain model: without it a
    quantizer stays attached and both training and `save_pretrained` refuse.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=load_gguf_config(path),
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
    )
    _tie_equal_embeddings(model, path)
    return model


def _tie_equal_embeddings(model: PreTrainedModel, path: Path) -> None:
    """Tie input and output embeddings that the file stores twice at different precisions.

    llama.cpp may write `output.weight` beside `token_embd.weight` for a model that ties them,
    and transformers then takes the model for an untied one. The more precise copy is kept.
    """
    ties = getattr(model.config, "tie_word_embeddings", False)
    if ties or "output.weight" not in read_metadata(path).tensors:
        return
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert isinstance(embedding, torch.Tensor) and isinstance(output, torch.Tensor)
    if embedding.shape != output.shape:
        return
    rows = slice(None, None, max(1, len(embedding) // 4096))  # a sample tells as much as all
    sample, other = embedding[rows].float(), output[rows].float()
    if (sample - other).norm() > _TIED_DIFFERENCE * sample.norm():
        return
    bits = {t.name: 8 * t.n_bytes / t.n_elements for t in GGUFReader(path).tensors}
    if bits["output.weight"] > bits["token_embd.weight"]:
        with torch.no_grad():
            embedding.copy_(output)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    # What `save_pretrained` consults, so that it writes the shared tensor once.
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


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
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=str(path), **settings)


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
