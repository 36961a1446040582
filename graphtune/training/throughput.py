"""How much of a device's arithmetic a run uses."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from graphtune.data import Batch, count_tokens
from graphtune.distributed import BATCH_AXES, data_rank, is_spread, size
from graphtune.program import Program
from graphtune.sites import find_sites
from graphtune.training.device import peak_memory
from graphtune.training.ranks import gathered_counts

# Dense bfloat16 matrix products, in FLOP/s, by a part of the device's name (vendors' data sheets).
_PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def flops_per_token(program: Program) -> int:
    """What the matrix products with weights cost, in FLOP per token of a training step.

    Two for each weight of a linear in the forward pass, two for the gradient of its input, and
    two for its own gradient where it trains. Attention itself, whose cost depends on the length,
    and experts, of which a token sees a few, are not counted.
    """
    parameters = program.all_parameters()
    total = 0
    for site in find_sites(program.graph):
        if site.kind == "linear":
            size = math.prod(site.stored_shape)
            weight = parameters.get(site.parameter)
            total += size * (6 if weight is not None and weight.requires_grad else 4)
    return total


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that a device can do at best, where that is known; None elsewhere."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK.items() if part in name), None)


def totals(counters: Mapping[str, Any]) -> dict[str, float]:
    """Of all steps that were counted: `skipped_steps`, `tokens` that are not padding, and
    `tokens_per_s`."""
    tokens = counters.get("tokens", 0)
    return {
        "skipped_steps": counters.get("skipped_steps", 0),
        "tokens": tokens,
        "tokens_per_s": tokens / max(counters.get("seconds", 0.0), 1e-9),
    }


class Meter:
    """Measures steps: how fast they are, and with how much memory.

    Tokens are those of all ranks, memory is this one's; `mfu` and `tflops` those of one
    on average. `of_ranks` has the figures of each.

    Args:
        program: what takes them.
        counters: to which `tokens` that are not padding and `seconds` are added.
        device: whose memory is told.
    """

    def __init__(self, program: Program, counters: dict[str, Any], device: torch.device) -> None:
        self.counters = counters
        self.device = device
        self.distribution = program.distribution
        self.flops = flops_per_token(program)
        self.peak = peak_flops(device, next(program.parameters()).dtype)
        self._own = (0.0, 0, 0)  # of this rank's last step: seconds, tokens, slots for them

    @contextmanager
    def timing(self, group: Sequence[Batch]) -> Iterator[dict[str, float]]:
        """Within it a step is taken on `group`; afterwards the mapping holds its figures."""
        figures: dict[str, float] = {}
        start = time.perf_counter()
        yield figures
        seconds = time.perf_counter() - start
        tokens = sum(count_tokens(one) for one in group)
        labelled = sum(int((one["labels"] >= 0).sum()) for one in group)
        slots = sum(one["input_ids"].numel() for one in group)
        self._own = (seconds, tokens, slots)
        ranks = 1
        if self.distribution is not None:
            counts = torch.tensor([tokens, labelled, slots], device=self.device)
            tokens, labelled, slots = self.distribution.sum(counts, BATCH_AXES).tolist()
            ranks = size(self.distribution.mesh, "cp") * data_rank()[1]
        self.counters["tokens"] = self.counters.get("tokens", 0) + tokens
        self.counters["seconds"] = self.counters.get("seconds", 0.0) + seconds
        figures |= {
            "tokens_per_s": tokens / seconds,
            "labelled_tokens_per_s": labelled / seconds,
            "padding": 1 - tokens / slots,
            "tflops": self.flops * slots / seconds / 1e12 / ranks,
            "peak_memory_bytes": peak_memory(self.device),
        }
        if self.peak is not None:
            figures["mfu"] = figures["tflops"] * 1e12 / self.peak

    def of_ranks(self) -> dict[str, Any]:
        """Figures of the last step by rank, where there are several, which must all call.

        Returns:
            `ranks`: lists, by rank, of `step_s`, `tokens` that are not `padding`, its share of the
            rank's batches, and `peak_memory_bytes`; and `slowest`, the rank whose step took
            longest. Ranks wait for each other within a step, so that their times differ little
            even if one is late.
        """
        if not is_spread():
            return {}
        seconds, tokens, slots = self._own
        counts = (round(seconds * 1e6), tokens, slots, peak_memory(self.device))
        micros, tokens_by_rank, slots_by_rank, peaks = zip(*gathered_counts(counts), strict=True)
        shares = zip(tokens_by_rank, slots_by_rank, strict=True)
        figures = {
            "step_s": [one / 1e6 for one in micros],
            "tokens": list(tokens_by_rank),
            "padding": [1 - real / of for real, of in shares],
            "peak_memory_bytes": list(peaks),
            "slowest": micros.index(max(micros)),
        }
        return {"ranks": figures}
