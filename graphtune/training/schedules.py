"""Learning-rate schedules, as factors on the optimizer's rate."""

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def schedule(
    optimizer: Optimizer,
    name: Literal["cosine", "linear", "constant"],
    *,
    steps: int,
    warmup_steps: int,
) -> LambdaLR:
    """Linear warm-up from zero, then the named shape down to zero at the last step.

    Args:
        optimizer: whose rates are multiplied.
        name: `cosine` (Loshchilov and Hutter, arXiv:1608.03983, without restarts), `linear`, or
            `constant`, which stays at the full rate.
        steps: optimizer steps of the whole run.
        warmup_steps: of these, how many warm up.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        part = (step - warmup_steps) / max(1, steps - warmup_steps)
        if name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, part)))
        return max(0.0, 1 - part) if name == "linear" else 1.0

    return LambdaLR(optimizer, factor)
