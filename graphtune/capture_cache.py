"""Captured graphs on disk, so that the second start of a model need not trace it again.

Only models without weights are kept: what `load_model(..., device="meta")` makes is determined by
its config, and what was captured of it is a few megabytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path

from torch import nn

from graphtune.cache import cache_dir
from graphtune.program import Program
from graphtune.serialize import load_program, save_program


def cache_file(model: nn.Module, images: bool = False) -> Path | None:
    """Where the capture of a model is, or would be, kept; None if it must be captured each time.

    The name is a hash of all that a graph depends on: the model's class, config and parameters,
    whether it takes images, the versions of torch and transformers, and our own source.
    """
    known = type(model).__module__.startswith(("transformers.", "graphtune."))
    if not known or not hasattr(model, "graphtune_buffers"):
        return None
    config = getattr(model, "config")  # noqa: B009  (nn.Module's type has none)
    settings = json.loads(config.to_json_string(use_diff=False))
    settings.pop("_name_or_path", None)  # where the weights are is not what the graph is
    parts = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": settings,
        "attention": getattr(config, "_attn_implementation", None),
        "experts": getattr(config, "_experts_implementation", None),
        "parameters": [
            (name, list(p.shape), str(p.dtype), p.requires_grad, p.is_meta)
            for name, p in model.named_parameters()
        ],
        "images": images,
        "training": model.training,
        "versions": [version("torch"), version("transformers"), _source()],
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    return cache_dir() / "captures" / f"{digest}.gt"


@cache
def source_hash() -> str:
    """Hash of all of graphtune's code."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@cache
def _source() -> str:
    """Hash of the code that makes graphs."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), *(here / "models").rglob("*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def recall(path: Path, model: nn.Module) -> Program | None:
    """The program that was kept, as if the model had been captured; None if there is none."""
    if not path.is_file():
        return None
    try:
        program = load_program(path)
    except Exception as error:  # whatever is wrong with the file, the model is still there
        warnings.warn(f"{path} cannot be read ({error}); capturing again", stacklevel=2)
        return None
    program.info = dataclasses.replace(
        program.info,
        source=getattr(model, "graphtune_source", None),
        config=getattr(model, "config", None),
    )
    return program


def keep(path: Path, program: Program) -> None:
    """Keep a captured program; a full or read-only disk is no reason to stop."""
    try:
        save_program(program, path)
    except OSError as error:
        warnings.warn(f"the captured graph cannot be kept in {path}: {error}", stacklevel=2)
