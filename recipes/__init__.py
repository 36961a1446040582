"""Recipes: one file for each objective. Below, what they share: from a config to a Program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphtune.capture import capture
from graphtune.config import check_options, component, did_you_mean
from graphtune.config.schema import ModelConfig
from graphtune.errors import UserError
from graphtune.models import load_model
from graphtune.passes import Pass, registry
from graphtune.program import Program


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


def build_program(model: ModelConfig, device: torch.device | str) -> Program:
    """Load a model and capture it. On the `meta` device, without its weights."""
    return capture(
        load_model(
            model.id,
            dtype=model.dtype,
            device=device,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
        )
    )
