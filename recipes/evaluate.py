"""Evaluation: the loss of a model, or of a run before and after it, on held-out data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from graphtune.capture import capture
from graphtune.config import Component, SFTConfig, load_config, validate
from graphtune.data import Loader
from graphtune.errors import UserError
from graphtune.models import load_tokenizer
from graphtune.passes import Stage
from graphtune.program import Program
from graphtune.recipes import empty_model, load_run, make_passes, origin
from graphtune.recipes.job import batching
from graphtune.recipes.reading import processor_of, read_data
from graphtune.training.device import pick_device
from graphtune.training.evaluate import evaluate_loss
from graphtune.training.run import Run
from graphtune.weights import load_weights

Figures = dict[str, float]


def evaluate_run(folder: str | Path, overrides: Sequence[str] = ()) -> dict[str, Figures]:
    """Measure what a run trained, and the model that it began with.

    Args:
        folder: the run's output_dir.
        overrides: of the run's config, such as `dataset_val.source=other.jsonl`.

    Returns:
        `before` and `after`, each as `measure` gives them.

    Raises:
        UserError: no run lies there, it names no held-out data, or an override changes what was
            trained.
    """
    run = Run.open(folder)
    own = validate(load_config(str(run.config_file)), SFTConfig)
    cfg = validate(load_config(str(run.config_file), overrides), SFTConfig)
    if (cfg.model.id, cfg.passes) != (own.model.id, own.passes):
        raise UserError(
            f"`model.id` and `passes` of the run {folder} are what it trained, so they stay; to "
            "evaluate another model, give a config in the run's place"
        )
    _check_data(cfg)
    figures = {}
    for name, tuned in (("before", False), ("after", True)):
        program, tokenizer = load_run(folder, tuned=tuned)
        figures[name] = measure(program, tokenizer, cfg)
        del program  # before the next is loaded
    return figures


def evaluate_model(cfg: SFTConfig) -> dict[str, Figures]:
    """Measure a config's model as it is before training, in the bits that its passes leave it.

    Returns:
        `model`, as `measure` gives it.

    Raises:
        UserError: the config names no held-out data, or something that cannot be loaded.
    """
    _check_data(cfg)
    device = pick_device(cfg.device)
    parts = [part for one in make_passes(cfg.passes) for part in one.parts()]
    quantize = [part for part in parts if part.stage == Stage.QUANTIZE]
    tokenizer = load_tokenizer(cfg.model.id, **origin(cfg.model))
    empty = empty_model(cfg.model, device)
    program = capture(empty, images=bool(cfg.model.images)).apply(*quantize)
    program = load_weights(program, device=device, **origin(cfg.model))
    return {"model": measure(program, tokenizer, cfg)}


def measure(program: Program, tokenizer: PreTrainedTokenizerBase, cfg: SFTConfig) -> Figures:
    """What a program makes of a config's held-out data.

    Returns:
        `heldout_loss`, nats per token that has a label, and `heldout_perplexity`, its exponential,
        on `dataset_val`; `retention_perplexity` on `retention`. Each where the config has it.
    """

    def loss(source: Component) -> float:
        options = cfg.loader
        rows = 1 if options.batch_size == "auto" else options.batch_size
        batches = Loader(
            read_data(source, reader, cfg),
            batching(options, rows, cfg.seed, shuffle=False),
            pad_token_id=tokenizer.pad_token_id,
            device=next(program.parameters()).device,
        )
        return evaluate_loss(program, batches)

    reader = processor_of(cfg, program.config) if program.takes_images else tokenizer
    figures = {}
    if cfg.dataset_val is not None:
        figures["heldout_loss"] = loss(cfg.dataset_val)
        figures["heldout_perplexity"] = math.exp(figures["heldout_loss"])
    if cfg.retention is not None:
        figures["retention_perplexity"] = math.exp(loss(cfg.retention))
    return figures


def _check_data(cfg: SFTConfig) -> None:
    if cfg.dataset_val is None and cfg.retention is None:
        raise UserError("there is nothing to evaluate on: set `dataset_val`, held-out data")
