"""A GGUF file as others read it: transformers, graphtune's own loader, llama.cpp."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GgufConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from graphtune.export.artifact import Artifact
from graphtune.export.gguf_metadata import context_length, head_dim_of
from graphtune.models.gguf import load_gguf_config, load_gguf_tokenizer, read_metadata

_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "x =   42\n\n\t12345 + 6,789 = 19134; I'll say: DON'T we've 3rd",
    "émigré naïve русский 한국어 日本語 ½ Ω 😀",
)


def load_with(path: Path, program: nn.Module) -> PreTrainedModel:
    """The file's tensors, as transformers reads them, in a model of the program's config."""
    own: Any = program.config
    config: PretrainedConfig = copy.deepcopy(own).get_text_config()
    if config.model_type == "mistral":  # llama.cpp has no such type, and transformers no names
        config = LlamaConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
    config.tie_word_embeddings = "output.weight" not in read_metadata(path).tensors
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        quantization_config=GgufConfig(dequantize=True),
        dtype=next(program.parameters()).dtype,
    )


def check_config(path: Path, config: PretrainedConfig) -> list[str]:
    """Compare what the file says of the model with its config.

    Returns:
        What transformers does not read from such files (llama.cpp does), and takes a default for
        that is not this model's.

    Raises:
        RuntimeError: another value is read than was meant.
    """
    found = load_gguf_config(path).get_text_config()
    stated = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ]
    pairs = {name: (getattr(found, name), getattr(config, name)) for name in stated}
    pairs["max_position_embeddings"] = (found.max_position_embeddings, context_length(config))
    pairs["rms_norm_eps"] = (
        torch.tensor(found.rms_norm_eps).item(),
        torch.tensor(config.rms_norm_eps).item(),
    )
    for name, (read, meant) in pairs.items():
        if read != meant:
            raise RuntimeError(
                f"{path.name}: `{name}` is read as {read}, not {meant}; nothing was kept"
            )
    unread = [] if head_dim_of(found) == head_dim_of(config) else ["head_dim"]
    unread += [
        name
        for name in (
            "rope_parameters",
            "sliding_window",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "query_pre_attn_scalar",
        )
        if getattr(found, name, None) != getattr(config, name, None)
    ]
    return unread


def check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise RuntimeError if the file's tokenizer splits text otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is checked here
        read = load_gguf_tokenizer(path)
    for text in _TEXTS:
        found, expected = (
            one(text, add_special_tokens=False)["input_ids"] for one in (read, tokenizer)
        )
        if found != expected:
            raise RuntimeError(
                f"{path.name}: its tokenizer makes {found} of {text!r}, not {expected}; nothing "
                "was kept. Pass no tokenizer to write the file without one"
            )


def check_llama_cpp(
    made: Artifact, path: Path, ids: Tensor, expected: Tensor, tolerance: float
) -> None:
    """Run the file in llama.cpp, which llama-cpp-python brings.

    Args:
        ids: int64 (1, seq).
        expected: logits (1, seq, vocab).
        tolerance: largest difference of a logit, where logits reach 10 or less.
    """
    found = llama_cpp_logits(path, ids)
    made.check("llama.cpp, to the program rounded", found, expected, tolerance)


def llama_cpp_logits(path: Path, ids: Tensor) -> Tensor:
    """Logits, float32 (1, seq, vocab), of int64 (1, seq) in llama.cpp, with a float32 cache."""
    import llama_cpp

    float32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(path),
        n_ctx=ids.shape[1],
        n_threads=torch.get_num_threads(),
        logits_all=True,
        type_k=float32,
        type_v=float32,
        flash_attn=False,
        verbose=False,
    )
    model.eval(ids[0].tolist())
    found = torch.tensor(model.scores[: ids.shape[1]])[None]
    model.close()
    return found
