"""Post-training quantization: integers for a model as it is, and what that costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from graphtune.capture import capture
from graphtune.config import SFTConfig, load_config, to_yaml, validate
from graphtune.data import Batch, Loader
from graphtune.errors import UserError
from graphtune.models import load_tokenizer
from graphtune.passes import QAT, Convert, Merge
from graphtune.passes.adapters import adapter_names
from graphtune.passes.awq import awq
from graphtune.passes.qat import observe
from graphtune.program import Program
from graphtune.recipes import empty_model, load_run, origin
from graphtune.recipes.evaluate import Figures, measure
from graphtune.recipes.job import batching
from graphtune.recipes.reading import read_data
from graphtune.training.device import pick_device
from graphtune.training.run import CONFIG, Run
from graphtune.weights import load_weights

METHODS = ("rtn", "hqq", "awq", "gptq")
Method = Literal["rtn", "hqq", "awq", "gptq"]

# For a model that no config names data for: English prose that every machine has.
_PROSE: dict[str, Any] = {"_component_": "graphtune.data.pydoc_topics", "limit": 24}
_DATA: dict[str, Any] = {
    "dataset": _PROSE,
    "dataset_val": {**_PROSE, "limit": 8},
    "loader": {"batch_size": 1, "length": 512, "mode": "packed", "shuffle": False},
}


def config_of(target: str, overrides: Sequence[str] = ()) -> SFTConfig:
    """The config of a run, of a file or a catalogued name; or one for a model that is named.

    Args:
        target: a run's folder, a config, or a model: hub id, folder, .gguf file.
        overrides: of the config.

    Raises:
        UserError: nothing of that name, or an override that does not fit.
    """
    if (Path(target) / CONFIG).is_file():
        return validate(load_config(str(Path(target) / CONFIG), overrides), SFTConfig)
    if Path(target).suffix in (".yaml", ".yml"):
        return validate(load_config(target, overrides), SFTConfig)
    made = OmegaConf.create({"output_dir": "unused", "model": {"id": target}, **_DATA})
    made.merge_with(OmegaConf.from_dotlist(list(overrides)))
    return validate(made, SFTConfig)


def quantize(
    target: str,
    output: str | Path,
    qat: QAT | None,
    *,
    method: Method = "rtn",
    batches: int = 16,
    overrides: Sequence[str] = (),
) -> dict[str, Figures]:
    """Quantize a model, or what a run trained, and save it as a run that other commands read.

    Args:
        target, overrides: see `config_of`. An adapter is merged first.
        output: folder; must be empty or missing.
        qat: what is quantized, and how; None as the run was trained for it.
        method: `rtn` rounds to the nearest, as `QAT` does; `hqq` and `awq` are torchao's (see
            `Convert` and `graphtune.passes.awq`).
        batches: of the config's data set, that `awq` and `int8_static` look at.

    Returns:
        `before` and `after`, each as `recipes.evaluate.measure` gives them.

    Raises:
        UserError: naming the option, its value and what would be right.
    """
    if method == "gptq":
        raise UserError(
            "`--method=gptq`: torchao 0.18 runs GPTQ on CUDA devices alone, and for 4 bits only "
            "with the package mslk; take hqq or awq"
        )
    cfg = config_of(target, overrides)
    if cfg.dataset_val is None and cfg.retention is None:
        raise UserError("there is nothing to measure perplexity on: set `dataset_val`")
    run = Run(output)
    run.refuse_used()
    is_run = (Path(target) / CONFIG).is_file()
    tokenizer = load_tokenizer(cfg.model.id, **origin(cfg.model))
    program = _load(target if is_run else None, cfg, trained_for=qat is None)
    before = measure(program, tokenizer, cfg)
    if qat is not None:
        program = program.apply(qat)
    data = list(itertools.islice(_batches(cfg, program, tokenizer), batches))
    if qat is not None:
        observe(program, data)
    if method == "awq":
        program = awq(program, data)
    program = program.apply(Convert("hqq" if method == "hqq" else "affine"))
    after = measure(program, tokenizer, cfg)
    saved = replace(cfg, passes={}, output_dir=str(output))
    Run.create(output, to_yaml(saved))
    program.save(run.program_file)
    return {"before": before, "after": after}


def _load(run: str | None, cfg: SFTConfig, *, trained_for: bool) -> Program:
    """What is quantized: in full precision, or with the run's own fake quantization."""
    if run is None:
        if trained_for:
            raise UserError("`--scheme` must be given for a model: 8da4w, int4, int8, ...")
        device = pick_device(cfg.device)
        program = capture(empty_model(cfg.model, device))
        return load_weights(program, device=device, **origin(cfg.model))
    program, _ = load_run(run, quantized=False, aware=trained_for)
    if any(row.name == "convert" for row in program.ledger):
        raise UserError(f"{run} is quantized already")
    if trained_for and not any(row.name == "qat" for row in program.ledger):
        raise UserError(
            f"{run} took no step with `passes.qat`, so nothing says how to quantize it; "
            "give a `--scheme`"
        )
    if adapter_names(program) and not trained_for:
        program = program.apply(Merge())
    return program


def _batches(cfg: SFTConfig, program: Program, tokenizer: Any) -> Iterator[Batch]:
    rows = 1 if cfg.loader.batch_size == "auto" else cfg.loader.batch_size
    loader = Loader(
        read_data(cfg.dataset, tokenizer, cfg),
        batching(cfg.loader, rows, cfg.seed, shuffle=False),
        pad_token_id=tokenizer.pad_token_id,
        device=next(program.parameters()).device,
    )
    return iter(loader)
