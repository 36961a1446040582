"""graphtune validate: everything about a config that can fail before weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer
from omegaconf import DictConfig

from graphtune.cli.app import OVERRIDES, Config, Overrides, app
from graphtune.config import (
    SCHEMAS,
    Component,
    SFTConfig,
    did_you_mean,
    foreign_code,
    load_config,
    to_plain,
)
from graphtune.config import validate as validate_config
from graphtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_FIRST = 8  # examples that are read of a data set


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        found: what it is; or why it could not be checked.
        checked: whether it could.
    """

    name: str
    found: str
    checked: bool = True


@app.command(context_settings=OVERRIDES, rich_help_panel="Configs")
def validate(
    config: Config,
    overrides: Overrides = None,
    data: Annotated[
        bool, typer.Option("--data/--no-data", help="Read the first rows of the data sets.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="The checks for a machine.")] = False,
) -> None:
    """Check all of CONFIG that can fail before weights are loaded; nothing is trained or written.

    Where the hub is out of reach, the shapes of published models serve, and what else would have
    come from it is listed as not checked.

    Example: graphtune validate llama3_1/8B_qlora passes.qlora.rank=16
    """
    made = []
    for check in checks(load_config(config, overrides or ()), data):
        made.append(check)
        if not as_json:
            unless = "" if check.checked else "not checked: "
            print(f"{check.name:<14}{unless}{check.found}", flush=True)
    left = sum(not check.checked for check in made)
    if as_json:
        print(json.dumps({"valid": True, "checks": [asdict(check) for check in made]}))
    else:
        print(f"{config}: valid" + (f", but {left} not checked" if left else ""))


def checks(config: DictConfig, data: bool) -> Iterator[Check]:
    """Check one thing after the other; raises UserError at the first that is wrong."""
    recipe = str(config.get("recipe"))
    if recipe not in SCHEMAS:
        raise UserError(f"unknown recipe `recipe={recipe}`{did_you_mean(recipe, SCHEMAS)}")
    from graphtune.passes import registry  # here, since it imports torch

    settings: Any = validate_config(config, SCHEMAS[recipe], registry)
    yield Check("config", f"keys, types and values of the recipe {recipe}")
    parts = list(_components(settings))
    yield Check("components", ", ".join(f"{part.key} {part.path}" for part in parts))
    for key, path in foreign_code(to_plain(settings)):
        yield Check("foreign code", f"`{key}` runs {path}, which is not of graphtune or torch")
    if isinstance(settings, SFTConfig):
        yield from _checks_of_training(settings, data)


def _checks_of_training(cfg: SFTConfig, data: bool) -> Iterator[Check]:
    from graphtune.capture import capture
    from graphtune.models.images import image_model
    from graphtune.recipes import check_length, config_to_look_at, empty_model, make_passes
    from graphtune.recipes.job import goes_on_in_place, make_optimizer, make_scheduler
    from graphtune.training.device import pick_device
    from graphtune.training.run import Run

    if not goes_on_in_place(cfg):
        Run(cfg.output_dir).refuse_used()
    yield Check("output", f"{cfg.output_dir} is free")
    device = pick_device(cfg.device)
    model_config, note = config_to_look_at(cfg.model)
    empty: Any = empty_model(cfg.model, device, model_config)
    count = sum(parameter.numel() for parameter in empty.parameters())
    kind = f"{type(empty).__name__}, {count:,} parameters, on {device}"
    if note:
        yield Check("model", note, checked=False)
    else:
        check_length(cfg, model_config)
    yield Check("model", kind)
    tokenizer = None
    for check, found in _tokenizer(cfg, offline=bool(note)):
        tokenizer = found
        yield check
    passes = make_passes(cfg.passes)
    for one in passes:
        one.check(empty)
    images = bool(cfg.model.images)
    of_data: list[Check] = []
    if data and tokenizer is not None:
        images, of_data = _checks_of_data(cfg, tokenizer, model_config)
    elif images:
        image_model(model_config)
    program = capture(empty, images=images).apply(*passes)
    trained = sum(parameter.numel() for parameter in program.trainable_parameters())
    if not trained:
        raise UserError("`passes` leave nothing to train; add `passes.lora` or `passes.full`")
    sites = ", ".join(f"{row.name} at {len(row.sites):,} sites" for row in program.ledger)
    if images:
        yield Check("images", "the model is trained with those of its data")
    yield Check("passes", f"{sites or 'none'}; {trained:,} parameters train")
    optimizer = make_optimizer(program, cfg)
    yield Check("optimizer", f"{type(optimizer).__name__}, {len(optimizer.param_groups)} group(s)")
    steps = cfg.max_steps or 1000
    scheduler = make_scheduler(optimizer, cfg, steps)
    yield Check("schedule", "none" if scheduler is None else type(scheduler).__name__)
    if not data:
        yield Check("data", "--no-data was given", checked=False)
    elif tokenizer is None:
        yield Check("data", "it needs the tokenizer", checked=False)
    else:
        yield from of_data


def _tokenizer(
    cfg: SFTConfig, *, offline: bool
) -> Iterator[tuple[Check, PreTrainedTokenizerBase | None]]:
    """The model's tokenizer; none, and no error, where the hub could not give its config either."""
    from graphtune.models import load_tokenizer
    from graphtune.recipes import origin

    try:
        tokenizer = load_tokenizer(cfg.model.id, **origin(cfg.model))
    except UserError:
        if not offline:
            raise
        yield Check("tokenizer", "it cannot be read here either", checked=False), None
        return
    template = "with" if tokenizer.chat_template else "without"
    yield Check("tokenizer", f"{len(tokenizer):,} tokens, {template} a chat template"), tokenizer


def _checks_of_data(
    cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig
) -> tuple[bool, list[Check]]:
    """Whether images are among the data, as far as is looked, and what was found of each set."""
    from graphtune.recipes.reading import first_examples

    found = []
    images, sets = first_examples(cfg, tokenizer, model, _FIRST)
    for key, examples in sets:
        first = examples[0].get("input_ids", ())
        found.append(Check(key, f"can be read; its first example has {len(first)} tokens"))
    return images, found


def _components(settings: Any) -> Iterator[Component]:
    for item in fields(settings):
        value = getattr(settings, item.name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Component):
                yield one
