"""Whether a run fits into the device's memory: asked before weights are loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from graphtune.errors import UserError
from graphtune.inspect.memory import MemoryEstimate, estimate, held
from graphtune.program import Program

HEADROOM = 0.9  # part of the free memory that a run may plan to take
_LARGEST = 1024  # rows that `largest_batch` tries at most

MakeOptimizer = Callable[[list[torch.nn.Parameter]], Any]


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a CPU, of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def check_fits(
    program: Program,
    shape: tuple[int, int],
    device: torch.device,
    *,
    compiled: bool,
    in_backward: bool = False,
    extra: int = 0,
    optimizer: MakeOptimizer | None = None,
) -> MemoryEstimate:
    """Estimate a step's memory, and refuse one that the device does not have.

    A compiled step fuses operators and keeps less for the backward pass than can be estimated, so
    that of it only what is there in any case is: weights, gradients, and the optimizer's state.

    Args:
        program: on any device, also `meta`.
        shape: of a batch, (rows, tokens per row).
        device: that the step will run on.
        compiled: whether it will be compiled.
        in_backward: the optimizer frees each gradient at once; not all of them are there together.
        extra: bytes that the run keeps besides.
        optimizer: called with the list of parameters that train; by default AdamW.

    Raises:
        UserError: with the estimate, and what would lower it.
    """
    if compiled:
        found = held(program, optimizer=optimizer)
    else:
        found = estimate(program, *shape, optimizer=optimizer)
    if in_backward and not compiled:
        found = dataclasses.replace(found, gradients=0)
    _refuse_too_large(found, extra, available_memory(device), shape, device)
    return found


def largest_batch(
    program: Program,
    shape: Callable[[int], tuple[int, int]],
    device: torch.device,
    *,
    extra: int = 0,
    optimizer: MakeOptimizer | None = None,
) -> int:
    """The largest batch size, up to 1024, whose step fits into 90 % of what is free now.

    Memory rises with the batch size almost as a line, so that a few estimates find it.

    Args:
        program: on any device, also `meta`.
        shape: batch size -> rows, and tokens per row.
        device: that the step will run on.
        extra: bytes that the run keeps besides.
        optimizer: called with the list of parameters that train; by default AdamW.

    Raises:
        UserError: not even a batch size of 1 fits.
    """
    free = HEADROOM * available_memory(device)

    def estimated(size: int) -> MemoryEstimate:
        return estimate(program, *shape(size), optimizer=optimizer)

    first = estimated(1)
    _refuse_too_large(first, extra, free, shape(1), device)
    fits, total = 1, first.total + extra  # of a batch size that fits
    fails = _LARGEST + 1
    slope = math.inf  # bytes for one more
    while fails - fits > 1:
        guess = fits + max(1, int((free - total) / slope))
        size = min(guess, fails - 1)
        needed = estimated(size).total + extra
        slope = max(1.0, (needed - total) / (size - fits))
        if needed <= free:
            fits, total = size, needed
        else:
            fails = size
    return fits


def _refuse_too_large(
    found: MemoryEstimate, extra: int, free: float, shape: tuple[int, int], device: torch.device
) -> None:
    needed = found.total + extra
    if needed <= free:
        return
    parts = ", ".join(
        f"{name} {getattr(found, name) / 2**30:.2f}"
        for name in ("parameters", "gradients", "optimizer", "activations")
    )
    raise UserError(
        f"a step on {shape[0]} x {shape[1]} tokens needs about {needed / 2**30:.2f} GiB, and "
        f"{free / 2**30:.2f} GiB are free on {device} (estimate in GiB: {parts}); {_advice(found)}"
    )


@contextmanager
def explaining_out_of_memory(batch_size: int, length: int) -> Iterator[None]:
    """Within it, running out of memory says what to lower."""
    try:
        yield
    except RuntimeError as error:  # what a CPU's allocator raises has no type of its own
        known = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        if not known:
            raise
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"out of memory with `loader.batch_size={batch_size}` and `loader.length={length}` "
            f"({first_line[:120]}); {_advice(None)}"
        ) from error


def _advice(found: MemoryEstimate | None) -> str:
    ways = []
    if found is None or found.activations > found.total / 4:
        ways.append("lower `loader.batch_size` or `loader.length`")
    if found is None or found.gradients + found.optimizer > found.total / 4:
        ways.append("train adapters (`passes.lora`) or use an 8-bit optimizer (torchao.optim)")
    if found is None or found.parameters > found.total / 4:
        ways.append("keep the base in four bits (`passes.qlora`)")
    return "; ".join(ways)
