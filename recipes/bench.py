"""Times steps of a config as it would train, without its weights and data."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graphtune.capture import capture
from graphtune.config import SFTConfig
from graphtune.data import Dataset
from graphtune.program import Program
from graphtune.recipes import config_to_look_at, empty_model, make_passes
from graphtune.recipes.job import Job, choose_batch_size
from graphtune.recipes.sft import micro_batches, set_up
from graphtune.training.device import peak_memory, pick_device
from graphtune.training.throughput import flops_per_token, peak_flops
from graphtune.weights import fill


def bench(cfg: SFTConfig, steps: int) -> dict[str, Any]:
    """Take optimizer steps on random tokens, with random weights, and time them.

    Graph, optimizer, loss, accumulation and shapes are the config's; every row is full, so that
    each token counts. How long a step takes depends on none of the values, except where a
    mixture's router sends tokens: random ones spread over the experts.

    Args:
        cfg: what would be trained.
        steps: how many are timed, after the first.

    Returns:
        `device`, `dtype`; `note`, if the model's config was not to be had; `trainable` parameters;
        `batch` (rows, tokens per row) and `accumulation`; `first_step_s`, in which the step is
        compiled; `step_s`, the median, `fastest_step_s` and `slowest_step_s`; `tokens_per_s`;
        `tflops_per_s` in products with weights, and `mfu`, their share of what the device can do,
        where that is known; `peak_memory_bytes`.

    Raises:
        UserError: as in training, but for data and weights.
        RuntimeError: something was compiled after the first step.
    """
    device = pick_device(cfg.device)
    config, note = config_to_look_at(cfg.model)
    empty: Any = empty_model(cfg.model, device, config)
    passes = make_passes(cfg.passes)
    for one in passes:
        one.check(empty)
    # Each epoch is a step; and a schedule for as many would be another than the config's.
    cfg = dataclasses.replace(cfg, epochs=steps + 1, max_steps=None, lr_scheduler=None)
    batch_size = cfg.loader.batch_size
    job = Job(
        config=cfg,
        device=device,
        empty=empty,
        passes=passes,
        tokenizer=cast(PreTrainedTokenizerBase, SimpleNamespace(pad_token_id=0)),
        dataset=_random_data(empty.config.vocab_size, cfg.loader.length, 1),
        dataset_val=None,
        retention=None,
        resume_from=None,
        batch_size=None if batch_size == "auto" else batch_size,
    )
    program = capture(empty).apply(*job.model_passes)
    rows = choose_batch_size(job, program.apply(*job.step_passes))
    count = rows * cfg.gradient_accumulation_steps
    data = _random_data(empty.config.vocab_size, cfg.loader.length, count)
    loader = job.loader(data, rows, train=True)
    program = fill(program, _random_weights(program, device), device)
    training = set_up(program, job, loader)
    seconds = []
    groups = micro_batches(loader, cfg.epochs, cfg.gradient_accumulation_steps)
    for group in itertools.islice(groups, steps + 1):
        start = time.perf_counter()
        training.step(group)
        if training.ema is not None:
            training.ema.update()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            compiled = training.step.compilations
    if training.step.compilations != compiled:
        raise RuntimeError(
            f"{training.step.compilations - compiled} graphs were compiled while steps were timed; "
            "TORCH_LOGS=recompiles tells why"
        )
    step_s = statistics.median(seconds[1:])
    tokens = sum(batch["input_ids"].numel() for batch in group)
    flops_per_s = flops_per_token(program) * tokens / step_s
    dtype = next(program.parameters()).dtype
    figures = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "note": note,
        "trainable": sum(p.numel() for p in program.trainable_parameters()),
        "batch": list(group[0]["input_ids"].shape),
        "accumulation": cfg.gradient_accumulation_steps,
        "compiled": cfg.compile,
        "steps": steps,
        "first_step_s": seconds[0],
        "step_s": step_s,
        "fastest_step_s": min(seconds[1:]),
        "slowest_step_s": max(seconds[1:]),
        "tokens_per_s": tokens / step_s,
        "tflops_per_s": flops_per_s / 1e12,
        "peak_memory_bytes": peak_memory(device),
    }
    if (peak := peak_flops(device, dtype)) is not None:
        figures["mfu"] = flops_per_s / peak
    return figures


def _random_data(vocab_size: int, length: int, examples: int) -> Dataset:
    """Examples of `length` random tokens, all of them learned."""
    ids = torch.randint(vocab_size, (examples, length), generator=torch.Generator().manual_seed(0))
    return Dataset.build(
        ({"input_ids": row, "labels": row} for row in ids.tolist()), max_length=None
    )


def _random_weights(program: Program, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """For each tensor of a checkpoint, one of its shape; norms are ones, so that signals live."""
    assert program.deferred is not None
    generator = torch.Generator(device).manual_seed(0)
    for name, like in program.deferred.checkpoint.items():
        value = torch.ones(like.shape, dtype=like.dtype, device=device)
        if like.dim() > 1:
            value.normal_(0, 0.02, generator=generator)
        yield name, value
