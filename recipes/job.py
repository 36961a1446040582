"""What a config names, built and checked together before anything that takes long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from graphtune.config import Component, LoaderConfig, SFTConfig, validate
from graphtune.data import Batching, Dataset, Loader, StreamingDataset, mix
from graphtune.errors import UserError
from graphtune.models import load_tokenizer
from graphtune.passes import Pass
from graphtune.recipes import empty_model, make_passes, origin
from graphtune.training.checkpoint_files import to_resume
from graphtune.training.device import pick_device
from graphtune.training.run import Run

Data = Dataset | StreamingDataset


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

    @property
    def origin(self) -> dict[str, Any]:
        """What besides its id says which checkpoint a model comes from."""
        return origin(self.config.model)

    def loader(self, dataset: Data, batch_size: int, *, train: bool = False) -> Loader:
        """Batches of a data set, on the job's device; in the config's order only to train."""
        options = self.config.loader
        return Loader(
            dataset,
            batching(options, batch_size, self.config.seed, shuffle=train and options.shuffle),
            pad_token_id=self.tokenizer.pad_token_id,
            workers=options.workers if train else 0,
            device=self.device,
        )

    def steps(self, loader: Loader) -> int:
        """Optimizer steps of the whole run."""
        cfg = self.config
        if isinstance(self.dataset, StreamingDataset):
            assert cfg.max_steps is not None  # `prepare` has seen to it
            return cfg.max_steps
        steps = cfg.epochs * math.ceil(len(loader) / cfg.gradient_accumulation_steps)
        return steps if cfg.max_steps is None else min(steps, cfg.max_steps)


def prepare(config: DictConfig) -> Job:
    """Everything that can fail, before anything that takes long. Writes nothing.

    Raises:
        UserError: naming the config key, its value and what would be right.
    """
    cfg = validate(config, SFTConfig)
    run = Run(cfg.output_dir)
    if cfg.resume is None:
        run.refuse_used()
    else:
        to_resume(cfg.resume, run.checkpoint_dir)
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
    dataset = read_data(cfg.dataset, tokenizer, cfg)
    if isinstance(dataset, StreamingDataset) and cfg.max_steps is None:
        raise UserError("`max_steps` must be set: how long a stream is cannot be known")

    def read(source: Component | None) -> Data | None:
        return None if source is None else read_data(source, tokenizer, cfg)

    validation = read(cfg.dataset_val)
    if validation is None and (cfg.validate_every or cfg.early_stopping):
        key = "validate_every" if cfg.validate_every else "early_stopping"
        raise UserError(f"`{key}` needs held-out data: set `dataset_val`")
    if cfg.early_stopping and not cfg.validate_every:
        raise UserError("`early_stopping` needs `validate_every`, the steps between validations")
    return Job(
        config=cfg,
        device=device,
        empty=empty,
        passes=passes,
        tokenizer=tokenizer,
        dataset=dataset,
        dataset_val=validation,
        retention=read(cfg.retention),
    )


def read_data(
    source: Component | list[Component], tokenizer: PreTrainedTokenizerBase, cfg: SFTConfig
) -> Data:
    """A config's data set; several are mixed by their weights, or laid end to end without."""
    if isinstance(source, Component):
        data: Data = source.build(tokenizer, max_length=cfg.loader.length)
        if not isinstance(data, StreamingDataset) and not data:
            raise UserError(f"`{source.key}` has no examples; check its source, split and filters")
        return data
    weights = [one.arguments.get("weight") for one in source]
    given = [weight is not None for weight in weights]
    if any(given) and not all(given):
        place = f"{source[given.index(False)].key}.weight"
        raise UserError(f"`{place}`: give each data set a weight, or none of them")
    parts = [read_data(one.without("weight"), tokenizer, cfg) for one in source]
    return mix(parts, weights if all(given) else None, seed=cfg.seed)  # type: ignore[arg-type]


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
