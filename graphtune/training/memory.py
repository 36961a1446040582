"""Whether a run fits into the device's memory: asked before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from graphtune.errors import UserError
from graphtune.inspect.memory import MemoryEstimate
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
    batch_size: int,
    seq: int,
    device: torch.device,
    *,
    compiled: bool,
    optimizer: MakeOptimizer | None = None,
) -> MemoryEstimate:
    """Estimate a step's memory, and refuse one that the device does not have.

    A compiled step fuses operators and keeps less for the backward pass than the estimate, so for
    it only what is there in any case is held against the device: weights, gradients, and the
    optimizer's state.

    Raises:
        UserError: with the estimate, and what would lower it.
    """
    estimate = program.memory(batch_size, seq, optimizer=optimizer)
    needed = estimate.total - (estimate.activations if compiled else 0)
    free = available_memory(device)
    if needed > free:
        parts = ", ".join(
            f"{name} {getattr(estimate, name) / 2**30:.2f}"
            for name in ("parameters", "gradients", "optimizer", "activations")
        )
        raise UserError(
            f"a step needs about {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free on "
            f"{device} (estimate in GiB: {parts}); {_advice(estimate, batch_size, seq)}"
        )
    return estimate


def largest_batch(
    program: Program, seq: int, device: torch.device, *, optimizer: MakeOptimizer | None = None
) -> int:
    """The most rows of `seq` tokens whose step fits into 90 % of what is free now.

    Memory rises with rows as a line, so that two estimates give it.

    Raises:
        UserError: not even one row fits.
    """
    one, two = (program.memory(rows, seq, optimizer=optimizer).total for rows in (1, 2))
    free = HEADROOM * available_memory(device)
    rows = 1 + int((free - one) // max(two - one, 1))
    if rows < 1:
        check_fits(program, 1, seq, device, compiled=False, optimizer=optimizer)
    return max(1, min(rows, _LARGEST))


@contextmanager
def explaining_out_of_memory(batch_size: int, seq: int) -> Iterator[None]:
    """Within it, running out of memory says what to lower."""
    try:
        yield
    except RuntimeError as error:  # what a CPU's allocator raises has no type of its own
        known = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        if not known:
            raise
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"out of memory ({first_line[:120]}); {_advice(None, batch_size, seq)}"
        ) from error


def _advice(estimate: MemoryEstimate | None, batch_size: int, seq: int) -> str:
    ways = []
    if estimate is None or estimate.activations > estimate.total / 4:
        ways.append(f"lower `loader.batch_size` (now {batch_size}) or `loader.length` (now {seq})")
    if estimate is None or estimate.optimizer > estimate.total / 4:
        ways.append("train adapters (`passes.lora`) or use an 8-bit optimizer (torchao.optim)")
    if estimate is None or estimate.parameters > estimate.total / 4:
        ways.append("keep the base in four bits (`passes.qlora`)")
    return "; ".join(ways)
