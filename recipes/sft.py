"""Supervised fine-tuning: next-token cross entropy on the answers of a data set.

Full fine-tuning, LoRA and whatever comes differ only by the passes in the config.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from graphtune.capture import capture
from graphtune.config import Component, SFTConfig, instantiate, to_yaml, validate
from graphtune.data import Batch, Dataset, batches, count_batches, count_tokens
from graphtune.engine import TrainStep, compile_step
from graphtune.errors import UserError
from graphtune.models import load_tokenizer
from graphtune.passes import Pass
from graphtune.program import Program
from graphtune.recipes import empty_model, make_passes, origin, save_trained
from graphtune.training.device import peak_memory, pick_device
from graphtune.training.evaluate import evaluate_loss
from graphtune.training.parameter_groups import ParameterGroup, parameter_groups
from graphtune.training.progress import TrainingProgress
from graphtune.training.run import Run
from graphtune.training.schedules import schedule
from graphtune.weights import load_weights

RETENTION_LIMIT = 1.10  # times its perplexity on unrelated text that a model may end with


def run(config: DictConfig) -> Run:
    """Train as the config says.

    Returns:
        The run's folder: config, metrics, loss curve, summary and what was trained.

    Raises:
        UserError: config, data or model cannot be used; before capture starts.
        KeyboardInterrupt: after what was learned so far has been saved.
    """
    console = Console()
    clock = Clock(console)
    with clock.phase("prepare", "reading config and data"):
        job = prepare(config)
    cfg = job.config
    run = Run.create(cfg.output_dir, to_yaml(cfg))
    torch.manual_seed(cfg.seed)
    with clock.phase("capture", "capturing the graph"):
        program = capture(job.empty)
    with clock.phase("passes", "applying passes"):
        program = program.apply(*job.passes)
        make_optimizer(program, cfg)  # fails here rather than after weights are loaded
    with clock.phase("load", "loading weights"):
        program = load_weights(program, device=job.device, **job.origin)
    console.print(program, highlight=False)

    with clock.phase("evaluate", "evaluating before training"):
        before = evaluate(program, job)
    trained: dict[str, float] = {}
    try:
        trained = train(program, job, run, clock, console)
    finally:  # also after Ctrl-C, or an error in the middle of the night
        with clock.phase("save", "saving"):
            save(program, job.tokenizer, run)
    with clock.phase("evaluate", "evaluating after training"):
        after = evaluate(program, job)
    report(run, before, after, trained, clock, console)
    return run


@dataclass(frozen=True)
class Job:
    """A config and what it names, all of it known to be usable together."""

    config: SFTConfig
    device: torch.device
    empty: nn.Module  # the model, without weights
    passes: list[Pass]
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    dataset_val: Dataset | None
    retention: Dataset | None
    steps_per_epoch: int

    @property
    def origin(self) -> dict[str, Any]:
        """What besides its id says which checkpoint a model comes from."""
        return origin(self.config.model)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.config.epochs * self.steps_per_epoch
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    def batches(self, dataset: Dataset, epoch: int = 0, shuffle: bool = False) -> Iterator[Batch]:
        """One epoch of batches; of one shape, so that the step compiles once."""
        loader = self.config.loader
        return batches(
            dataset,
            batch_size=loader.batch_size,
            length=loader.length,
            packed=loader.packed,
            seed=self.config.seed,
            epoch=epoch,
            shuffle=shuffle,
            pad_token_id=self.tokenizer.pad_token_id,
        )


def prepare(config: DictConfig) -> Job:
    """Everything that can fail, before anything that takes long. Writes nothing.

    Raises:
        UserError: naming the config key, its value and what would be right.
    """
    cfg = validate(config, SFTConfig)
    Run(cfg.output_dir).refuse_used()
    device = pick_device(cfg.device)
    passes = make_passes(cfg.passes)
    empty = empty_model(cfg.model, device)
    positions = getattr(empty.config, "max_position_embeddings", None)
    if positions is not None and cfg.loader.length > positions:
        raise UserError(
            f"`loader.length={cfg.loader.length}` is more than the {positions} positions of "
            f"{cfg.model.id}; choose at most {positions}"
        )
    for one in passes:
        one.check(empty)
    tokenizer = load_tokenizer(cfg.model.id, **origin(cfg.model))

    def read(source: Component | None) -> Dataset | None:
        return instantiate(source, tokenizer, max_length=cfg.loader.length)

    dataset = read(cfg.dataset)
    if not dataset:
        raise UserError("`dataset` has no examples; check its source, split and filters")
    per_epoch = count_batches(
        dataset,
        batch_size=cfg.loader.batch_size,
        length=cfg.loader.length,
        packed=cfg.loader.packed,
    )
    return Job(
        config=cfg,
        device=device,
        empty=empty,
        passes=passes,
        tokenizer=tokenizer,
        dataset=dataset,
        dataset_val=read(cfg.dataset_val),
        retention=read(cfg.retention),
        steps_per_epoch=math.ceil(per_epoch / cfg.gradient_accumulation_steps),
    )


def train(program: Program, job: Job, run: Run, clock: Clock, console: Console) -> dict[str, float]:
    """The training loop; logs each step to the run's folder."""
    cfg, steps = job.config, job.steps
    optimizer = make_optimizer(program, cfg)
    scheduler = make_scheduler(optimizer, job)
    step = compile_step(program, optimizer, compile=cfg.compile, clip_grad_norm=cfg.clip_grad_norm)
    with clock.phase("compile", "compiling the step, and checking its gradients"):
        warm_up(step, job)

    tokens, seconds = 0, 0.0
    with clock.phase("train", "training"), TrainingProgress(steps, console) as progress:
        for number, group in enumerate(itertools.islice(groups(job), steps), start=1):
            start = time.perf_counter()
            on_device = [{k: v.to(job.device) for k, v in one.items()} for one in group]
            metrics = step(on_device)
            rate = optimizer.param_groups[0]["lr"]
            if scheduler is not None:
                scheduler.step()
            elapsed = time.perf_counter() - start
            here = sum(count_tokens(one) for one in group)
            tokens, seconds = tokens + here, seconds + elapsed
            if not math.isfinite(metrics["loss"]):
                raise RuntimeError(f"the loss is {metrics['loss']} at step {number}; lower the lr")
            if number % cfg.log_every and number != steps:
                continue
            memory = peak_memory(job.device)
            run.log(
                {
                    "step": number,
                    **metrics,
                    "lr": rate,
                    "tokens_per_s": here / elapsed,
                    "peak_memory_bytes": memory,
                }
            )
            progress.update(
                number,
                loss=metrics["loss"],
                tokens_per_s=here / elapsed,
                memory=memory,
                eta_s=seconds / number * (steps - number),
            )
    return {"steps": steps, "tokens": tokens, "tokens_per_s": tokens / seconds}


def groups(job: Job) -> Iterator[list[Batch]]:
    """The batches of each optimizer step, epoch after epoch."""
    size = job.config.gradient_accumulation_steps
    for epoch in range(job.config.epochs):
        epoch_batches = job.batches(job.dataset, epoch, shuffle=job.config.loader.shuffle)
        while group := list(itertools.islice(epoch_batches, size)):
            yield group


def warm_up(step: TrainStep, job: Job) -> None:
    """Compile on the first batch; compiled loss and gradients must be the eager ones."""
    if job.config.compile:
        first = next(groups(job))[0]
        step.check({name: tensor.to(job.device) for name, tensor in first.items()})


def make_optimizer(program: Program, cfg: SFTConfig) -> torch.optim.Optimizer:
    """The optimizer over what trains; in groups, where the config has some."""
    if not cfg.parameter_groups:
        return instantiate(cfg.optimizer, list(program.trainable_parameters()))
    lr = cfg.optimizer.arguments.get("lr")
    if lr is None:
        raise UserError("`parameter_groups` needs a learning rate to multiply: set `optimizer.lr`")
    groups = [
        ParameterGroup(tuple(one.parameters), one.lr_ratio, one.weight_decay)
        for one in cfg.parameter_groups
    ]
    return instantiate(cfg.optimizer, parameter_groups(program.named_parameters(), groups, lr=lr))


def make_scheduler(optimizer: torch.optim.Optimizer, job: Job) -> Any:
    """The learning-rate schedule, stepped once for each optimizer step; None for no schedule."""
    options = job.config.lr_scheduler
    if options is None or isinstance(options, Component):
        return instantiate(options, optimizer)
    warmup = options.warmup_steps
    if warmup is None:
        warmup = round(options.warmup_ratio * job.steps)
    return schedule(optimizer, options.name, steps=job.steps, warmup_steps=warmup)


def evaluate(program: Program, job: Job) -> dict[str, float]:
    """Loss on held-out data, and perplexity on unrelated text, of what the config names."""
    results: dict[str, float] = {}
    if job.dataset_val is not None:
        results["heldout_loss"] = evaluate_loss(program, job.batches(job.dataset_val))
    if job.retention is not None:
        results["retention_perplexity"] = math.exp(
            evaluate_loss(program, job.batches(job.retention))
        )
    return results


def save(program: Program, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
    """What was trained, in the layout that others read, where there is one for it."""
    save_trained(program, tokenizer, run)
    if run.metrics():
        run.plot_loss()


def report(
    run: Run,
    before: dict[str, float],
    after: dict[str, float],
    trained: dict[str, float],
    clock: Clock,
    console: Console,
) -> None:
    """Write the summary, and print it."""
    summary: dict[str, Any] = {"before": before, "after": after, "train": trained}
    summary["seconds"] = {name: round(spent, 2) for name, spent in clock.seconds.items()}
    run.write_summary(summary)
    if "heldout_loss" in after:
        drop = before["heldout_loss"] - after["heldout_loss"]
        console.print(
            f"held-out loss {before['heldout_loss']:.4f} → {after['heldout_loss']:.4f} "
            f"({-drop:+.4f} nats per token)",
            highlight=False,
        )
    if "retention_perplexity" in after:
        ratio = after["retention_perplexity"] / before["retention_perplexity"]
        verdict = "kept" if ratio <= RETENTION_LIMIT else "FORGOT: lower the rate, or train less"
        console.print(
            f"unrelated text, perplexity {before['retention_perplexity']:.2f} → "
            f"{after['retention_perplexity']:.2f} ({ratio - 1:+.1%}; {verdict})",
            highlight=False,
        )
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.seconds.items())
    console.print(f"{spent}; {trained['tokens_per_s']:,.0f} tokens/s", highlight=False)
    console.print(f"saved in {run.folder}", highlight=False)


class Clock:
    """Seconds spent in each phase of a run; says which one is going on."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, doing: str) -> Iterator[None]:
        self.console.print(doing, style="dim")
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
