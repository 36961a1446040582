"""Learning-rate schedules, as factors on the optimizer's rate."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from graphtune.errors import UserError

Shape: TypeAlias = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"]

TIMESCALE = 10_000  # of inverse_sqrt without a warm-up, as in transformers


def schedule(
    optimizer: Optimizer,
    name: Shape,
    *,
    steps: int,
    warmup_steps: int,
    min_ratio: float = 0.0,
    decay_steps: int = 0,
) -> LambdaLR:
    """Linear warm-up, then the named shape.

    The rates are those of `transformers.get_scheduler` without its first step, at which nothing
    is learned: the first step here has a rate above zero, and a warm-up of n steps reaches the
    full rate at the step that follows it.

    Args:
        optimizer: whose rates are multiplied.
        name: `cosine` (Loshchilov and Hutter, arXiv:1608.03983, without restarts) and `linear` fall
            until the last step; `constant` stays at the full rate; `wsd` (Hu et al.,
            arXiv:2404.06395) does so too until its last `decay_steps`, in which it falls as one
            minus a square root (Hägele et al., arXiv:2405.18392); `inverse_sqrt` (Vaswani et al.,
            arXiv:1706.03762) falls with the square root of the steps, and has no end.
        steps: optimizer steps of the whole run.
        warmup_steps: of these, how many warm up.
        min_ratio: what falls, falls towards this part of the full rate; in [0, 1].
        decay_steps: of `wsd`, how many steps at the end decay.

    Raises:
        UserError: an unknown name, or numbers that do not go together.
    """
    if name not in get_args(Shape):
        raise UserError(f"`lr_scheduler.name={name}` must be one of {', '.join(get_args(Shape))}")
    if not 0 <= min_ratio <= 1:
        raise UserError(f"`lr_scheduler.min_ratio={min_ratio}` must be in [0, 1]")
    if decay_steps and warmup_steps + decay_steps > steps:
        raise UserError(
            f"`lr_scheduler`: {warmup_steps} steps of warm-up and {decay_steps} of decay are more "
            f"than the run's {steps}; lower one of them"
        )
    shape = _SHAPES[name]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        fallen = shape(step - warmup_steps, steps - warmup_steps, warmup_steps, decay_steps)
        return min_ratio + (1 - min_ratio) * fallen

    return Schedule(optimizer, factor)


class Schedule(LambdaLR):
    """Goes on by its own shape: the optimizer's saved rate is that of the shape before it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        rates = [
            base * factor(self.last_epoch)
            for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates


# What is left of the rate `step` steps after the warm-up, when `left` steps follow it in all.


def _cosine(step: int, left: int, warmup: int, decay: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, left))))


def _linear(step: int, left: int, warmup: int, decay: int) -> float:
    return max(0.0, 1 - step / max(1, left))


def _constant(step: int, left: int, warmup: int, decay: int) -> float:
    return 1.0


def _wsd(step: int, left: int, warmup: int, decay: int) -> float:
    part = (step - (left - decay)) / max(1, decay)
    return 1 - math.sqrt(min(1.0, max(0.0, part)))


def _inverse_sqrt(step: int, left: int, warmup: int, decay: int) -> float:
    timescale = warmup + 1 if warmup else TIMESCALE
    return math.sqrt(timescale / (timescale + step))


_SHAPES: dict[str, Callable[[int, int, int, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}
