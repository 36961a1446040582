"""Supervised fine-tuning: next-token cross entropy on the answers of a data set.

Full fine-tuning, LoRA, quantized bases and whatever comes differ only by the passes in the config.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch.distributed import get_rank

from graphtune.capture import capture
from graphtune.config import SFTConfig, to_plain, to_yaml
from graphtune.config import validate as validate_config
from graphtune.data import Batch, Loader
from graphtune.distributed import is_main, is_spread, size
from graphtune.distributed import stop as leave_ranks
from graphtune.engine import NotFinite, TrainStep, compile_step, save_batches
from graphtune.generation import encode_chat, generate, stop_ids
from graphtune.losses import Loss
from graphtune.passes import CausalAttention, FusedLoss, Stage, optimized
from graphtune.passes.qat import at_step
from graphtune.program import Program
from graphtune.recipes import save_trained
from graphtune.recipes.job import (
    Data,
    Job,
    checkpoint_of,
    choose_batch_size,
    goes_on_in_place,
    has_ended,
    join_ranks,
    loss_of,
    make_optimizer,
    make_scheduler,
    prepare,
)
from graphtune.training.checkpoint import Checkpointer
from graphtune.training.clock import Clock
from graphtune.training.determinism import seed_everything
from graphtune.training.ema import EMA, evaluation_weights, start_training
from graphtune.training.evaluate import evaluate_loss
from graphtune.training.loggers import Loggers
from graphtune.training.memory import explaining_out_of_memory
from graphtune.training.profiling import StepProfiler
from graphtune.training.progress import TrainingProgress
from graphtune.training.ranks import main_first, on_any, seed_rank
from graphtune.training.results import print_results
from graphtune.training.run import Run
from graphtune.training.signals import StopSignals
from graphtune.training.state import TrainState
from graphtune.training.throughput import Meter, totals
from graphtune.weights import load_weights

DISTRIBUTED = True  # trains in as many processes as a launcher starts
NO_PROFILE = {"start": 0, "steps": 0}


def run(config: DictConfig) -> Run:
    """Train as the config says; in one process, or in each of those that a launcher has started.

    Returns:
        The run's folder: config, metrics, loss curve, summary and what was trained.

    Raises:
        UserError: config, data or model cannot be used, before capture starts; a run that does
            not fit into memory, before weights are loaded.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the run has been saved.
    """
    join_ranks(validate_config(config, SFTConfig))
    try:
        return run_on_rank(config)
    finally:
        leave_ranks()


def run_on_rank(config: DictConfig) -> Run:
    """What every rank does; rank 0 alone writes."""
    console = Console(highlight=False, quiet=not is_main())
    if has_ended(config):
        console.print(
            f"the run in {config.output_dir} has ended; to train on, raise `max_steps` or `epochs`"
        )
        return Run(config.output_dir)
    clock = Clock(console)
    with clock.phase("prepare", "reading config and data"):
        resume_from = checkpoint_of(config)
        job = main_first(lambda: prepare(config, resume_from))
    cfg = job.config
    seed_everything(cfg.seed, cfg.deterministic)
    with clock.phase("capture", "capturing the graph"):
        # the others find it in the cache
        program = main_first(lambda: capture(job.empty, images=job.images))
    with clock.phase("passes", "applying passes"):
        undivided = [one for one in job.model_passes if one.stage < Stage.DISTRIBUTE]
        whole = program.apply(*undivided) if is_spread() else None  # to be saved
        program = program.apply(*job.model_passes)
    with clock.phase("memory", "estimating memory"):
        batch_size = choose_batch_size(job, program.apply(*job.step_passes))
        loader = job.loader(job.dataset, batch_size, train=True)
        make_scheduler(make_optimizer(program, cfg), cfg, job.steps(loader))  # fails here, or never
    with clock.phase("load", "loading weights"):
        program = load_weights(program, device=job.device, **job.origin)
    seed_rank(cfg.seed)
    run = Run.create(cfg.output_dir, to_yaml(cfg), resume=goes_on_in_place(cfg), writes=is_main())

    with explaining_out_of_memory(batch_size, cfg.loader.length):
        training = set_up(program, job, loader)
        console.print(
            f"{training.step.program}\n{training.step}\n"
            f"batches of {batch_size}, {training.steps} steps"
        )
        with clock.phase("compile", "compiling the step, and checking its gradients"):
            warm_up(training)
        go_on(training, run, console)
        counters = training.state.counters
        if "before" not in counters:
            with clock.phase("evaluate", "evaluating before training"):
                counters["before"] = evaluate(training)
        try:
            interrupted = train(training, run, clock, console)
        except Exception:  # in the middle of the night: keep what was learned until then
            if not is_spread():  # else other ranks may not be there any more
                save(training, run, clock, whole)
            raise
        save(training, run, clock, whole)
        if interrupted:
            raise KeyboardInterrupt
        with clock.phase("evaluate", "evaluating after training"):
            after = evaluate(training)
    trained = {"steps": training.state.step, **totals(counters)}
    results = {"before": counters["before"], "after": after, "train": trained}
    print_results(results, clock.seconds, console)
    run.write_summary({**results, "seconds": clock.seconds})
    console.print(f"saved in {run.folder}")
    return run


@dataclass
class Training:
    """What takes steps, and what they change.

    The programs share all tensors.
    """

    job: Job
    program: Program  # gives logits
    evaluated: Program  # perhaps the loss alone, which takes less memory
    optimizer: torch.optim.Optimizer
    scheduler: Any
    ema: EMA | None
    step: TrainStep
    loader: Loader
    steps: int
    state: TrainState  # of all of the above
    evaluation_loss: Loss

    def evaluating(self, data: Data) -> Iterator[Batch]:
        """One epoch of a data set that is not trained on."""
        return iter(self.job.loader(data, self.loader.batching.batch_size, self.evaluated))


def set_up(program: Program, job: Job, loader: Loader) -> Training:
    """Optimizer, schedule and step of a job, about to take the first step."""
    cfg = job.config
    planned = program.apply(*job.step_passes)
    trained = optimized(planned) if cfg.compile else planned
    fused = [one for one in job.step_passes if isinstance(one, FusedLoss)]
    causal = [CausalAttention()] if cfg.compile else []
    evaluated = program.apply(*(FusedLoss(one.chunks, backward=False) for one in fused), *causal)
    loader.masked = not trained.takes_documents
    steps = job.steps(loader)
    optimizer = make_optimizer(program, cfg)
    scheduler = make_scheduler(optimizer, cfg, steps)
    ema = None if cfg.ema_decay is None else EMA(program.named_parameters(), cfg.ema_decay)
    loss = loss_of(cfg, job.passes)
    step = compile_step(
        trained, optimizer, compile=cfg.compile, clip_grad_norm=cfg.clip_grad_norm, loss=loss
    )
    start_training(optimizer)
    parts = {"scheduler": scheduler, "ema": ema, "loader": loader}
    state = TrainState(
        planned, [optimizer], to_plain(cfg), {k: v for k, v in parts.items() if v is not None}
    )
    state.counters["batch_size"] = loader.batching.batch_size  # if it was chosen, it stays
    return Training(
        job=job,
        program=program,
        evaluated=evaluated,
        optimizer=optimizer,
        scheduler=scheduler,
        ema=ema,
        step=step,
        loader=loader,
        steps=steps,
        state=state,
        evaluation_loss=loss_of(cfg, job.passes, plain=True),
    )


def warm_up(training: Training) -> None:
    """Compile on the first batch; compiled loss and gradients must be the eager ones."""
    if training.job.config.compile:
        training.step.check(training.loader.peek())


def go_on(training: Training, run: Run, console: Console) -> None:
    """Go on where a checkpoint was taken, if the config says so and there is one.

    Last of all before training: it sets the random number generators.
    """
    if (found := training.job.resume_from) is not None:
        training.state.restore(found)
        start_training(training.optimizer)
        console.print(f"going on from {found}")
    run.rewind(training.state.step)


def train(training: Training, run: Run, clock: Clock, console: Console) -> bool:
    """The training loop; logs, validates and saves as the config says.

    Returns:
        Whether a signal ended it.
    """
    cfg, state = training.job.config, training.state
    meter = Meter(training.program, state.counters, training.job.device)
    with ExitStack() as stack:
        stack.enter_context(clock.phase("train", "training"))
        loggers = Loggers(cfg.loggers if run.writes else {}, run.folder, to_plain(cfg))
        stack.callback(loggers.close)
        options = {**to_plain(cfg.checkpoint), "timeout_s": cfg.mesh.timeout_s}
        checkpoints = Checkpointer(run.checkpoint_dir, **options)
        stack.enter_context(checkpoints)
        stop = stack.enter_context(StopSignals(console.print))
        progress = stack.enter_context(TrainingProgress(training.steps, console))
        profile = to_plain(cfg.profile or NO_PROFILE) if run.writes else NO_PROFILE
        profiler = StepProfiler(run.folder / "profile.json", device=training.job.device, **profile)
        stack.callback(profiler.close)

        stopped = False
        left = 0 if stops_early(training) else max(0, training.steps - state.step)
        groups = micro_batches(training.loader, cfg.epochs, cfg.gradient_accumulation_steps)
        for group in itertools.islice(groups, left):
            profiler.before(state.step + 1)
            with meter.timing(group) as speed:
                metrics = take_step(training, group, run)
            metrics |= speed
            heldout = None
            if cfg.validate_every and state.step % cfg.validate_every == 0:
                heldout = metrics["heldout_loss"] = validate(training)
            if cfg.samples and state.step % cfg.samples.every_steps == 0:
                write_samples(training, run, console)
            enough = stops_early(training)
            stopped, due = on_any(stop.requested, checkpoints.due(state.step))
            last = enough or stopped or state.step == training.steps
            if last or heldout is not None or state.step % cfg.log_every == 0:
                metrics |= meter.of_ranks()
                run.log({"step": state.step, **metrics})
                loggers.log(state.step, metrics)
                spent = state.counters["seconds"] / state.step
                progress.update(
                    state.step,
                    loss=metrics["loss"],
                    tokens_per_s=metrics["tokens_per_s"],
                    memory=metrics["peak_memory_bytes"],
                    eta_s=spent * (training.steps - state.step),
                )
            is_ranked = heldout is not None and cfg.checkpoint.keep_best > 0
            if due or is_ranked:
                checkpoints.save(state, metric=heldout)
            if enough:
                console.print(f"stopping early: no new best in {cfg.early_stopping}")
            if enough or stopped:
                break
        else:
            if state.step < training.steps and left:
                console.print(f"the data ended before step {training.steps}")
        if stopped or cfg.checkpoint.every_steps or cfg.checkpoint.every_minutes:
            checkpoints.save(state)  # also at the end: to train on from there
    return stopped


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
    recent = counters.get("recent_losses", [])
    if spikes and len(recent) == spikes.window:
        limit = spikes.factor * sum(recent) / len(recent)
    at_step(training.program, state.step, group)
    try:
        metrics: dict[str, Any] = training.step(group, loss_limit=limit)
    except NotFinite as error:
        of_rank = f"_rank_{get_rank()}" if is_spread() else ""
        path = run.folder / f"bad_batch_step_{state.step + 1}{of_rank}.safetensors"
        save_batches(group, path)
        raise RuntimeError(f"step {state.step + 1}: {error}; its batch is in {path}") from error
    if training.program.distribution is not None:  # ranks that share rows counted them each
        metrics["tokens"] //= size(training.program.distribution.mesh, "cp")
    state.step += 1
    skipped = metrics.pop("skipped", 0)
    if spikes:
        metrics["skipped_steps"] = counters["skipped_steps"] = (
            counters.get("skipped_steps", 0) + skipped
        )
        if not skipped:
            counters["recent_losses"] = [*recent, metrics["loss"]][-spikes.window :]
    if training.scheduler is not None:
        training.scheduler.step()
    if training.ema is not None and not skipped:
        training.ema.update()
    return {**metrics, "lr": lr}


def validate(training: Training) -> float:
    """The held-out loss; counts how long it has had no new best."""
    loss = evaluate(training, retention=False)["heldout_loss"]
    options, counters = training.job.config.early_stopping, training.state.counters
    least = options.min_delta if options else 0.0
    if loss < counters.get("best_heldout", math.inf) - least:
        counters |= {"best_heldout": loss, "validations_since_best": 0}
    else:
        counters["validations_since_best"] = counters.get("validations_since_best", 0) + 1
    return loss


def stops_early(training: Training) -> bool:
    """Whether the held-out loss has had no new best for as long as the config allows."""
    options = training.job.config.early_stopping
    since = training.state.counters.get("validations_since_best", 0)
    return options is not None and since >= options.patience


def evaluate(training: Training, *, retention: bool = True) -> dict[str, float]:
    """Loss on held-out data, and perplexity on unrelated text, of what the config names."""
    job, results = training.job, {}
    with evaluation_weights(training.optimizer, training.ema):
        if job.dataset_val is not None:
            batches = training.evaluating(job.dataset_val)
            loss = evaluate_loss(training.evaluated, batches, training.evaluation_loss)
            results["heldout_loss"] = loss
        if retention and job.retention is not None:
            batches = training.evaluating(job.retention)
            loss = evaluate_loss(training.evaluated, batches, training.evaluation_loss)
            results["retention_perplexity"] = math.exp(loss)
    return results


def write_samples(training: Training, run: Run, console: Console) -> None:
    """Answer the config's prompts, to the console and `samples.jsonl`."""
    options, tokenizer = training.job.config.samples, training.job.tokenizer
    assert options is not None
    if not run.writes:
        return
    stop = stop_ids(training.program, tokenizer)
    with evaluation_weights(training.optimizer, training.ema):
        for prompt in options.prompts:
            tokens = generate(
                training.program,
                [encode_chat(tokenizer, prompt, None)],
                stop_ids=stop,
                max_new_tokens=options.max_new_tokens,
                tokenizer=tokenizer,
            )
            answer = "".join(token.text for token in tokens)
            run.log_sample({"step": training.state.step, "prompt": prompt, "answer": answer})
            console.print(f"{prompt!r} → {answer!r}", markup=False)


def save(training: Training, run: Run, clock: Clock, whole: Program | None) -> None:
    """What was trained, in the layout that others read, where there is one for it."""
    with clock.phase("save", "saving"), evaluation_weights(training.optimizer, training.ema):
        save_trained(training.program, training.job.tokenizer, run, whole)
        if run.metrics():
            run.plot_loss()
