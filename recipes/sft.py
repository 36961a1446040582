"""Supervised fine-tuning: next-token cross entropy on the answers of a data set.

Full fine-tuning, LoRA, quantized bases and whatever comes differ only by the passes in the config.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from safetensors.torch import save_file

from graphtune.capture import capture
from graphtune.config import Component, SFTConfig, instantiate, to_plain, to_yaml
from graphtune.data import Batch, Loader
from graphtune.engine import NotFinite, TrainStep, compile_step
from graphtune.errors import UserError
from graphtune.losses import cross_entropy
from graphtune.program import Program
from graphtune.recipes import save_trained
from graphtune.recipes.generate import encode_chat, generate, stop_ids
from graphtune.recipes.job import Data, Job, prepare
from graphtune.training.checkpoint import Checkpointer
from graphtune.training.checkpoint_files import to_resume
from graphtune.training.clock import Clock
from graphtune.training.determinism import seed_everything
from graphtune.training.ema import EMA, evaluation_weights, start_training
from graphtune.training.evaluate import evaluate_loss
from graphtune.training.loggers import Loggers
from graphtune.training.memory import check_fits, explaining_out_of_memory, largest_batch
from graphtune.training.optimizers import OptimizerInBackward
from graphtune.training.parameter_groups import ParameterGroup, parameter_groups
from graphtune.training.profiling import StepProfiler
from graphtune.training.progress import TrainingProgress
from graphtune.training.run import Run
from graphtune.training.schedules import schedule
from graphtune.training.signals import StopSignals
from graphtune.training.state import TrainState
from graphtune.training.throughput import Meter
from graphtune.weights import load_weights

NO_PROFILE = {"start": 0, "steps": 0}
RETENTION_LIMIT = 1.10  # times its perplexity on unrelated text that a model may end with


def run(config: DictConfig) -> Run:
    """Train as the config says.

    Returns:
        The run's folder: config, metrics, loss curve, summary and what was trained.

    Raises:
        UserError: config, data or model cannot be used, before capture starts; a run that does
            not fit into memory, before weights are loaded.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the run has been saved.
    """
    console = Console()
    clock = Clock(console)
    with clock.phase("prepare", "reading config and data"):
        job = prepare(config)
    cfg = job.config
    run = Run.create(cfg.output_dir, to_yaml(cfg), resume=cfg.resume is not None)
    seed_everything(cfg.seed, cfg.deterministic)
    with clock.phase("capture", "capturing the graph"):
        program = capture(job.empty)
    with clock.phase("passes", "applying passes"):
        program = program.apply(*job.passes)
        make_scheduler(make_optimizer(program, cfg), cfg, 100)  # fails here, not after loading
    with clock.phase("memory", "estimating memory"):
        batch_size = choose_batch_size(program, job, console)
    with clock.phase("load", "loading weights"):
        program = load_weights(program, device=job.device, **job.origin)
    console.print(program, highlight=False)

    with explaining_out_of_memory(batch_size, cfg.loader.length):
        training = set_up(program, job, batch_size)
        with clock.phase("compile", "compiling the step, and checking its gradients"):
            warm_up(training)
        if (found := to_resume(cfg.resume, run.checkpoint_dir)) is not None:
            training.state.restore(found)  # last of all: it sets the random number generators
            start_training(training.optimizer)
            run.rewind(training.state.step)
            console.print(f"going on from {found}", highlight=False)
        if "before" not in training.state.counters:
            with clock.phase("evaluate", "evaluating before training"):
                training.state.counters["before"] = evaluate(training)
        try:
            trained = train(training, run, clock, console)
        finally:  # also after Ctrl-C, or an error in the middle of the night
            with clock.phase("save", "saving"):
                save(training, run)
        with clock.phase("evaluate", "evaluating after training"):
            after = evaluate(training)
    report(run, training.state.counters["before"], after, trained, clock, console)
    return run


def choose_batch_size(program: Program, job: Job, console: Console) -> int:
    """The config's batch size, or the largest that fits; refuses a run that cannot fit."""
    cfg, options = job.config, job.config.loader

    def optimizer(parameters: list[torch.nn.Parameter]) -> Any:
        named = [(f"parameter.{index}", parameter) for index, parameter in enumerate(parameters)]
        return instantiate(cfg.optimizer, named)

    if options.batch_size == "auto":
        size = largest_batch(program, options.length, job.device, optimizer=optimizer)
        console.print(f"`loader.batch_size=auto` is {size}", highlight=False)
        return size
    estimate = check_fits(
        program,
        options.batch_size,
        options.length,
        job.device,
        compiled=cfg.compile,
        optimizer=optimizer,
    )
    at_most = "at most " if cfg.compile else ""
    console.print(f"a step takes {at_most}{estimate.total / 2**30:.2f} GiB", highlight=False)
    return options.batch_size


@dataclass
class Training:
    """What takes steps, and what they change."""

    job: Job
    program: Program
    optimizer: torch.optim.Optimizer
    scheduler: Any
    ema: EMA | None
    step: TrainStep
    loader: Loader
    steps: int
    state: TrainState  # of all of the above

    def evaluating(self, data: Data) -> Iterator[Batch]:
        """One epoch of a data set that is not trained on."""
        return iter(self.job.loader(data, self.loader.batching.batch_size))


def set_up(program: Program, job: Job, batch_size: int) -> Training:
    """Optimizer, schedule, step and loader of a job, about to take the first step."""
    cfg = job.config
    loader = job.loader(job.dataset, batch_size, train=True)
    steps = job.steps(loader)
    optimizer = make_optimizer(program, cfg)
    scheduler = make_scheduler(optimizer, cfg, steps)
    ema = None if cfg.ema_decay is None else EMA(program.named_parameters(), cfg.ema_decay)
    loss = functools.partial(cross_entropy, label_smoothing=cfg.label_smoothing, z_loss=cfg.z_loss)
    step = compile_step(
        program, optimizer, compile=cfg.compile, clip_grad_norm=cfg.clip_grad_norm, loss=loss
    )
    start_training(optimizer)
    parts = {"scheduler": scheduler, "ema": ema, "loader": loader}
    state = TrainState(
        program, [optimizer], to_plain(cfg), {k: v for k, v in parts.items() if v is not None}
    )
    return Training(job, program, optimizer, scheduler, ema, step, loader, steps, state)


def train(training: Training, run: Run, clock: Clock, console: Console) -> dict[str, float]:
    """The training loop; logs, validates and saves as the config says.

    Returns:
        `steps`, `tokens` (that are not padding) and `tokens_per_s` of the run so far.
    """
    cfg, state = training.job.config, training.state
    counters = state.counters
    meter = Meter(training.program, counters, training.job.device)
    with ExitStack() as stack:
        stack.enter_context(clock.phase("train", "training"))
        loggers = Loggers(cfg.loggers, run.folder, to_plain(cfg))
        stack.callback(loggers.close)
        checkpoints = stack.enter_context(make_checkpointer(cfg, run))
        stop = stack.enter_context(StopSignals(lambda m: console.print(m, highlight=False)))
        progress = stack.enter_context(TrainingProgress(training.steps, console))
        profiler = StepProfiler(run.folder / "profile.json", **to_plain(cfg.profile or NO_PROFILE))
        stack.callback(profiler.close)

        def log(metrics: dict[str, Any]) -> None:
            run.log({"step": state.step, **metrics})
            loggers.log(state.step, metrics)

        groups = micro_batches(training.loader, cfg.epochs, cfg.gradient_accumulation_steps)
        for group in itertools.islice(groups, training.steps - state.step):
            profiler.before(state.step + 1)
            with meter.timing(group) as speed:
                metrics = take_step(training, group, run)
            metrics |= speed
            if state.step % cfg.log_every == 0 or state.step == training.steps:
                log(metrics)
                progress.update(
                    state.step,
                    loss=metrics["loss"],
                    tokens_per_s=metrics["tokens_per_s"],
                    memory=metrics["peak_memory_bytes"],
                    eta_s=counters["seconds"] / state.step * (training.steps - state.step),
                )
            heldout = None
            if cfg.validate_every and state.step % cfg.validate_every == 0:
                heldout = evaluate(training, retention=False)["heldout_loss"]
                log({"heldout_loss": heldout})
            if cfg.samples and state.step % cfg.samples.every_steps == 0:
                write_samples(training, run, console)
            enough = stops_early(training, heldout)
            is_ranked = heldout is not None and cfg.checkpoint.keep_best > 0
            if checkpoints.due(state.step) or stop.requested or is_ranked:
                checkpoints.save(state, metric=heldout)
            if stop.requested:
                raise KeyboardInterrupt
            if enough:
                console.print(f"stopping early: no new best in {cfg.early_stopping}")
                break
    seconds = max(counters.get("seconds", 0.0), 1e-9)
    tokens = counters.get("tokens", 0)
    return {"steps": state.step, "tokens": tokens, "tokens_per_s": tokens / seconds}


def micro_batches(loader: Loader, epochs: int, size: int) -> Iterator[list[Batch]]:
    """The batches of each optimizer step, for what is left of the epochs."""
    while loader.epoch < epochs:
        batches = iter(loader)
        while group := list(itertools.islice(batches, size)):
            yield group


def take_step(training: Training, group: list[Batch], run: Run) -> dict[str, Any]:
    """One optimizer step, and all that goes with it.

    Raises:
        RuntimeError: the loss or a gradient is not a number. Nothing was updated, and the batch
            is in the run's folder.
    """
    state, counters = training.state, training.state.counters
    lr = float(training.optimizer.param_groups[0]["lr"])  # some keep a tensor
    limit, spikes = math.inf, training.job.config.skip_spikes
    recent = counters.setdefault("recent_losses", [])
    if spikes and len(recent) == spikes.window:
        limit = spikes.factor * sum(recent) / len(recent)
    try:
        metrics = training.step(group, loss_limit=limit)
    except NotFinite as error:
        path = run.folder / f"bad_batch_step_{state.step + 1}.safetensors"
        tensors = {f"{i}.{k}": t.contiguous() for i, b in enumerate(group) for k, t in b.items()}
        save_file(tensors, path)
        raise RuntimeError(f"step {state.step + 1}: {error}; its batch is in {path}") from error
    state.step += 1
    if spikes and "skipped" not in metrics:
        counters["recent_losses"] = [*recent, metrics["loss"]][-spikes.window :]
    if training.scheduler is not None:
        training.scheduler.step()
    if training.ema is not None:
        training.ema.update()
    return {**metrics, "lr": lr}


def make_optimizer(program: Program, cfg: SFTConfig) -> torch.optim.Optimizer:
    """The optimizer over what trains; in groups, where the config has some."""
    trained = [(name, p) for name, p in program.named_parameters() if p.requires_grad]
    given: Any = trained
    if cfg.parameter_groups:
        lr = cfg.optimizer.arguments.get("lr")
        if lr is None:
            raise UserError("`parameter_groups` multiply a learning rate: set `optimizer.lr`")
        groups = [
            ParameterGroup(tuple(one.parameters), one.lr_ratio, one.weight_decay)
            for one in cfg.parameter_groups
        ]
        given = parameter_groups(trained, groups, lr=lr)
    optimizer = instantiate(cfg.optimizer, given)
    if cfg.ema_decay is not None and hasattr(optimizer, "eval"):
        raise UserError("`ema_decay`: a schedule-free optimizer averages by itself; set it to null")
    if not cfg.optimizer_in_backward:
        return optimizer
    if cfg.gradient_accumulation_steps > 1 or cfg.clip_grad_norm is not None:
        raise UserError(
            "`optimizer_in_backward=true` updates before all gradients are there: set "
            "`gradient_accumulation_steps=1` and `clip_grad_norm=null`"
        )
    return OptimizerInBackward(optimizer)


def make_scheduler(optimizer: torch.optim.Optimizer, cfg: SFTConfig, steps: int) -> Any:
    """The learning-rate schedule, stepped once for each optimizer step; None for no schedule."""
    options = cfg.lr_scheduler
    if options is None or isinstance(options, Component):
        return instantiate(options, optimizer)
    warmup = options.warmup_steps
    if warmup is None:
        warmup = round(options.warmup_ratio * steps)
    return schedule(
        optimizer,
        options.name,
        steps=steps,
        warmup_steps=warmup,
        min_ratio=options.min_ratio,
        decay_steps=round(options.decay_ratio * steps) if options.name == "wsd" else 0,
    )


def make_checkpointer(cfg: SFTConfig, run: Run) -> Checkpointer:
    return Checkpointer(run.checkpoint_dir, **to_plain(cfg.checkpoint))


def warm_up(training: Training) -> None:
    """Compile on the first batch; compiled loss and gradients must be the eager ones."""
    if training.job.config.compile:
        training.step.check(training.loader.peek())


def evaluate(training: Training, *, retention: bool = True) -> dict[str, float]:
    """Loss on held-out data, and perplexity on unrelated text, of what the config names."""
    job, results = training.job, {}
    with evaluation_weights(training.optimizer, training.ema):
        if job.dataset_val is not None:
            batches = training.evaluating(job.dataset_val)
            results["heldout_loss"] = evaluate_loss(training.program, batches)
        if retention and job.retention is not None:
            batches = training.evaluating(job.retention)
            results["retention_perplexity"] = math.exp(evaluate_loss(training.program, batches))
    return results


def stops_early(training: Training, heldout: float | None) -> bool:
    """Whether the held-out loss has had no new best for as long as the config allows."""
    options, counters = training.job.config.early_stopping, training.state.counters
    if options is None or heldout is None:
        return False
    if heldout < counters.get("best_heldout", math.inf) - options.min_delta:
        counters |= {"best_heldout": heldout, "validations_since_best": 0}
    else:
        counters["validations_since_best"] = counters.get("validations_since_best", 0) + 1
    return counters["validations_since_best"] >= options.patience


def write_samples(training: Training, run: Run, console: Console) -> None:
    """Answer the config's prompts, to the console and `samples.jsonl`."""
    options, tokenizer = training.job.config.samples, training.job.tokenizer
    assert options is not None
    stop = stop_ids(training.program, tokenizer)
    with evaluation_weights(training.optimizer, training.ema):
        for prompt in options.prompts:
            ids = encode_chat(tokenizer, prompt, None)
            new = generate(training.program, ids, stop=stop, max_new_tokens=options.max_new_tokens)
            answer = str(tokenizer.decode(list(new), skip_special_tokens=True))
            line = {"step": training.state.step, "prompt": prompt, "answer": answer}
            with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            console.print(f"{prompt!r} → {answer!r}", highlight=False, markup=False)


def save(training: Training, run: Run) -> None:
    """What was trained, in the layout that others read, where there is one for it."""
    with evaluation_weights(training.optimizer, training.ema):
        save_trained(training.program, training.job.tokenizer, run)
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
