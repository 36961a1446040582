"""What a config names, built and checked together before anything that takes long."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from graphtune.capture_cache import source_hash
from graphtune.config import (
    Component,
    LoaderConfig,
    SFTConfig,
    instantiate,
    load_config,
    to_plain,
    validate,
)
from graphtune.data import Batching, Loader, StreamingDataset
from graphtune.distributed import data_rank, start
from graphtune.errors import UserError
from graphtune.generation import encode_chat
from graphtune.losses import (
    ContextParallelCrossEntropy,
    Loss,
    VocabParallelCrossEntropy,
    cross_entropy,
)
from graphtune.models import load_tokenizer
from graphtune.passes import ContextParallel, FusedLoss, Pass, Stage, TensorParallel
from graphtune.program import Program
from graphtune.recipes import check_length, empty_model, make_passes, origin
from graphtune.recipes.reading import Data, read_sets
from graphtune.training.checkpoint import resumed
from graphtune.training.device import pick_device
from graphtune.training.loggers import check_loggers
from graphtune.training.memory import check_fits, largest_batch
from graphtune.training.optimizers import OptimizerInBackward
from graphtune.training.parameter_groups import ParameterGroup, parameter_groups
from graphtune.training.ranks import gathered, together
from graphtune.training.run import Run
from graphtune.training.schedules import schedule
from graphtune.training.state import leaves, saved_counters


@dataclass(frozen=True)
class Job:
    """A config and what it names, all of it known to be usable together."""

    config: SFTConfig
    device: torch.device
    empty: nn.Module  # the model, without weights
    passes: list[Pass]
    tokenizer: PreTrainedTokenizerBase
    dataset: Data
    dataset_val: Data | None
    retention: Data | None
    resume_from: Path | None  # checkpoint
    batch_size: int | None  # None: `choose_batch_size` finds it

    @property
    def model_passes(self) -> list[Pass]:
        """Those that make the model, which all its uses share."""
        return [one for one in self.passes if one.stage < Stage.LOSS]

    @property
    def step_passes(self) -> list[Pass]:
        """Those that say how it is trained: the loss, and what is kept for the backward pass."""
        return [one for one in self.passes if one.stage >= Stage.LOSS]

    @property
    def images(self) -> bool:
        """Whether the model takes images."""
        return self.config.model.images is True

    @property
    def origin(self) -> dict[str, Any]:
        """What besides its id says which checkpoint a model comes from."""
        return origin(self.config.model)

    def loader(
        self,
        dataset: Data,
        batch_size: int,
        program: Program | None = None,
        *,
        train: bool = False,
    ) -> Loader:
        """Batches of a data set, on the job's device; in the config's order only to train.

        Args:
            program: what is given them, if it is known; it may do without masks.
        """
        options = self.config.loader
        rank, world = data_rank()
        return Loader(
            dataset,
            batching(options, batch_size, self.config.seed, shuffle=train and options.shuffle),
            pad_token_id=self.tokenizer.pad_token_id,
            rank=rank,
            world=world,
            workers=options.workers if train else 0,
            device=self.device,
            masked=program is None or not program.takes_documents,
        )

    def steps(self, loader: Loader) -> int:
        """Optimizer steps of the whole run."""
        cfg = self.config
        if isinstance(self.dataset, StreamingDataset):
            assert cfg.max_steps is not None  # `prepare` has seen to it
            return cfg.max_steps
        steps = cfg.epochs * math.ceil(len(loader) / cfg.gradient_accumulation_steps)
        return steps if cfg.max_steps is None else min(steps, cfg.max_steps)


def checkpoint_of(config: DictConfig) -> Path | None:
    """The checkpoint that a run goes on with, the same on all of its ranks; all must call.

    Raises:
        UserError: on every rank; there is none that can be used, or the run's folder is used.
    """
    cfg = validate(config, SFTConfig)
    run = Run(cfg.output_dir)
    if not goes_on_in_place(cfg):
        together(run.refuse_used)
    return resumed(cfg.resume, run.checkpoint_dir)


def prepare(config: DictConfig, resume_from: Path | None) -> Job:
    """Everything that can fail, before anything that takes long. Writes nothing.

    Args:
        resume_from: see `checkpoint_of`.

    Raises:
        UserError: naming the config key, its value and what would be right.
    """
    cfg = validate(config, SFTConfig)
    check_loggers(cfg.loggers)
    device = rank_device(cfg.device)
    passes = [with_loss_options(one, cfg) for one in make_passes(cfg.passes)]
    empty = empty_model(cfg.model, device)
    check_length(cfg, empty.config)
    for one in passes:
        one.check(empty)
    tokenizer = load_tokenizer(cfg.model.id, **origin(cfg.model))
    check_samples(cfg, tokenizer, empty.config)
    cfg, (dataset, validation, retention) = read_sets(cfg, tokenizer, empty.config)
    if isinstance(dataset, StreamingDataset) and cfg.max_steps is None:
        raise UserError("`max_steps` must be set: how long a stream is cannot be known")
    if validation is None and (cfg.validate_every or cfg.early_stopping):
        key = "validate_every" if cfg.validate_every else "early_stopping"
        raise UserError(f"`{key}` needs held-out data: set `dataset_val`")
    if cfg.early_stopping and not cfg.validate_every:
        raise UserError("`early_stopping` needs `validate_every`, the steps between validations")
    counters = {} if resume_from is None else saved_counters(resume_from, to_plain(cfg))
    chosen = cfg.loader.batch_size
    check_spread(cfg, passes)
    return Job(
        config=cfg,
        device=device,
        empty=empty,
        passes=passes,
        tokenizer=tokenizer,
        dataset=dataset,
        dataset_val=validation,
        retention=retention,
        resume_from=resume_from,
        batch_size=counters.get("batch_size") if chosen == "auto" else chosen,
    )


def rank_device(name: str) -> torch.device:
    """A device by name; of several of a kind, that of this rank on its machine."""
    device = pick_device(name)
    if device.type != "cpu" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
    if device.type != "cpu" and "LOCAL_RANK" in os.environ:
        torch.accelerator.set_device_index(device)
    return device


def join_ranks(cfg: SFTConfig) -> None:
    """Meet the other ranks of the run, where a launcher has started several.

    Raises:
        UserError: on all of them: the mesh does not fit their number, one is missing, or has
            another config or other code.
    """
    sizes = {**to_plain(cfg.mesh), "dp_shard": cfg.mesh.dp_shard or -1}
    facts = {key: repr(value) for key, value in leaves(to_plain(cfg)) if key != "device"}
    facts |= {f"version of {name}": version(name) for name in ("graphtune", "torch")}
    facts["graphtune's code"] = source_hash()
    start(rank_device(cfg.device), facts=facts, **sizes)


def with_loss_options(one: Pass, cfg: SFTConfig) -> Pass:
    """A pass, the config's `label_smoothing` and `z_loss` with it if it computes the loss."""
    if not isinstance(one, FusedLoss):
        return one
    return dataclasses.replace(one, label_smoothing=cfg.label_smoothing, z_loss=cfg.z_loss)


def goes_on_in_place(cfg: SFTConfig) -> bool:
    """Whether a run is gone on with in its own folder; from elsewhere, a new one begins."""
    if cfg.resume in (None, "auto"):
        return cfg.resume == "auto"
    return Path(cfg.resume).resolve().is_relative_to(Path(cfg.output_dir).resolve())


def has_ended(config: DictConfig) -> bool:
    """Whether `resume=auto` finds a run that has ended, and nothing says that it shall go on."""
    cfg = validate(config, SFTConfig)
    run = Run(cfg.output_dir)
    if cfg.resume != "auto" or not run.summary():
        return False
    was = validate(load_config(str(run.config_file)), SFTConfig)
    limits = ("epochs", "max_steps", "early_stopping")
    return all(getattr(was, name) == getattr(cfg, name) for name in limits)


def check_spread(cfg: SFTConfig, passes: list[Pass]) -> None:
    """Raise UserError for what a rank that has a part of the model or of a row cannot do."""
    names = {one.name for one in passes}
    if cfg.samples is not None and names & {"fsdp", "tensor_parallel", "context_parallel"}:
        raise UserError(
            "`samples` need the whole model on a rank; set it to null, or take data_parallel"
        )


def loss_of(cfg: SFTConfig, passes: list[Pass], *, plain: bool = False) -> Loss:
    """The loss of the logits that a rank has.

    Args:
        plain: without the config's `label_smoothing` and `z_loss`.
    """
    smoothing, z_loss = (0.0, 0.0) if plain else (cfg.label_smoothing, cfg.z_loss)
    for one in passes:
        if isinstance(one, ContextParallel):
            return ContextParallelCrossEntropy(label_smoothing=smoothing, z_loss=z_loss)
        if isinstance(one, TensorParallel) and not one.gather_logits:
            return VocabParallelCrossEntropy(label_smoothing=smoothing, z_loss=z_loss)
    return functools.partial(cross_entropy, label_smoothing=smoothing, z_loss=z_loss)


def check_samples(
    cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> None:
    """Raise UserError if a prompt and its answer do not fit into the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if cfg.samples is None or positions is None:
        return
    for index, prompt in enumerate(cfg.samples.prompts):
        tokens = len(encode_chat(tokenizer, prompt, None))
        if tokens + cfg.samples.max_new_tokens > positions:
            raise UserError(
                f"`samples.prompts[{index}]` has {tokens} tokens, which with "
                f"`samples.max_new_tokens={cfg.samples.max_new_tokens}` are more than the "
                f"{positions} positions of {cfg.model.id}; lower one of them"
            )


def batching(options: LoaderConfig, batch_size: int, seed: int, *, shuffle: bool) -> Batching:
    """A config's `loader` as options of `graphtune.data.Loader`."""
    return Batching(
        mode=options.mode,
        batch_size=batch_size,
        length=options.length,
        shapes=options.shapes,
        fit=options.fit,
        shuffle=shuffle,
        seed=seed,
        window=options.window,
    )


def choose_batch_size(job: Job, program: Program) -> int:
    """The config's batch size, or for `auto` the largest that fits.

    Raises:
        UserError: a step would not fit into the device's memory.
    """
    cfg = job.config

    def optimizer(parameters: list[nn.Parameter]) -> Any:
        return instantiate(cfg.optimizer, [(f"parameter.{i}", p) for i, p in enumerate(parameters)])

    def shape(size: int) -> tuple[int, int]:
        length = cfg.loader.length
        return (1, size * length) if cfg.loader.mode == "padding_free" else (size, length)

    trained = sum(parameter.numel() for parameter in program.trainable_parameters())
    extra = 0 if cfg.ema_decay is None else 4 * trained
    if job.batch_size is None:
        return min(
            gathered(largest_batch(program, shape, job.device, extra=extra, optimizer=optimizer))
        )
    check_fits(
        program,
        shape(job.batch_size),
        job.device,
        compiled=bool(cfg.compile),
        in_backward=cfg.optimizer_in_backward,
        extra=extra,
        optimizer=optimizer,
    )
    return job.batch_size


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
    divided = program.distribution is not None and program.distribution.parts
    component = cfg.optimizer if divided else in_one_call(cfg.optimizer)
    optimizer = instantiate(component, given)
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


def in_one_call(optimizer: Component) -> Component:
    """An optimizer of torch updates all parameters together, unless the config names another way.

    By default, torch on a CPU calls ten kernels for each of an adapter's hundreds of matrices. The
    result is the same, bit for bit, which that of `fused` is not.
    """
    named = {"fused", "foreach", "capturable", "differentiable"} & optimizer.arguments.keys()
    if named or not optimizer.path.startswith("torch.optim.") or not optimizer.takes("foreach"):
        return optimizer
    return optimizer.having(foreach=True)


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
