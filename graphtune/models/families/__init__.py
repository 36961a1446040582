"""Model families as data: one file each, which turns a Hugging Face config into options.

To add one see docs/models.md.
"""

from __future__ import annotations

import copy
import pkgutil
import re
from importlib import import_module

from transformers import PretrainedConfig

from graphtune.errors import UserError
from graphtune.models.families.family import Family, Size
from graphtune.models.transformer import DecoderOptions, Transformer

__all__ = ["FAMILIES", "Family", "Size", "build_model", "published_config", "read_options"]

_modules = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY for module in _modules if hasattr(module, "FAMILY")
)
_BY_TYPE = {family.model_type: family for family in FAMILIES}  # those of one type read alike


def read_options(config: PretrainedConfig) -> DecoderOptions:
    """What a config means, read by the family that has its `model_type`.

    Raises:
        UserError: there is no such family, or the config asks for what the decoder has not.
    """
    family = _BY_TYPE.get(config.model_type)
    if family is None:
        raise UserError(
            "model.implementation: graphtune has no decoder for the model type "
            f"{config.model_type!r}, only for {', '.join(sorted(_BY_TYPE))}; use 'transformers'"
        )
    return family.read(config)


def build_model(config: PretrainedConfig) -> Transformer:
    """A model with random weights, on the default device and in the default dtype.

    Args:
        config: the model keeps a copy of it as `config`.

    Raises: as `read_options`.
    """
    model = Transformer(read_options(config))
    model.initialize(config.initializer_range)
    model.config = copy.deepcopy(config)
    # How another class attends says nothing about this one, which knows one way.
    model.config._attn_implementation = None
    return model


def published_config(id: str) -> PretrainedConfig | None:
    """The shapes of a published model, known without asking anybody; None for an unknown one.

    A model that was trained further (`-Instruct`, `-it`, `-chat`) has the shapes of its base.
    Bases and scalings of rotations, tokens and the like are those of its class, not its own:
    enough to look at a graph, not to run it.
    """
    wanted = _base(id)
    for family in FAMILIES:
        for name in family.sizes:
            if _base(name) == wanted:
                return family.config(name)
    return None


def _base(id: str) -> str:
    return re.sub(r"-(instruct|it|pt|chat|base|hf)(?=-|$)", "", id.lower())
