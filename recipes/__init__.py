"""Recipes: one file for each objective. Below, what they share: from a config to a Program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from graphtune.capture import capture
from graphtune.config import SFTConfig, check_options, component, did_you_mean, validate
from graphtune.config import load_config as read_config
from graphtune.errors import UserError
from graphtune.export.peft import from_peft
from graphtune.models import load_model, load_tokenizer
from graphtune.passes import Pass, registry
from graphtune.program import Program
from graphtune.training.device import pick_device
from graphtune.training.run import Run


def make_passes(options: Mapping[str, Mapping[str, Any] | None]) -> list[Pass]:
    """The passes that a config's `passes` names.

    Args:
        options: name of a pass, or dotted path of a class, to its options.

    Raises:
        UserError: no such pass or option, or a value that it refuses.
    """
    made = []
    for name, values in options.items():
        key = f"passes.{name}"
        kind: Any = registry.get(name) or ("." in name and component(name, key))
        if not kind:
            raise UserError(f"`{key}`: there is no pass {name!r}{did_you_mean(name, registry)}")
        made.append(check_options(kind, values or {}, key))
    return made


def load_run(folder: str | Path, *, tuned: bool = True) -> tuple[Program, PreTrainedTokenizerBase]:
    """The program and the tokenizer of a run that `train` wrote.

    Args:
        folder: the run's output_dir.
        tuned: False gives the base model, as it was before training.

    Raises:
        UserError: no run lies there, or it saved nothing.
    """
    run = Run.open(folder)
    config: SFTConfig = validate(read_config(str(run.config_file)))
    model = config.model
    source: dict[str, Any] = {
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
    }
    tokenizer = load_tokenizer(model.id, **source)
    device = pick_device(config.device)
    if tuned and run.model_dir.is_dir():
        return capture(load_model(run.model_dir, dtype=model.dtype, device=device)), tokenizer
    program = capture(load_model(model.id, dtype=model.dtype, device=device, **source))
    return (from_peft(program, run.adapter_dir) if tuned else program), tokenizer
