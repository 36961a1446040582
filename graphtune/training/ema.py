"""Averages of the weights, which are evaluated and saved in place of the weights that train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphtune.errors import UserError


class EMA:
    """Exponential moving average of the parameters that train.

    Polyak and Juditsky, 1992; the average starts at the parameters' present values and becomes
    `decay * average + (1 - decay) * parameter` at each update. It is kept in float32, since what
    an update adds to it would be rounded away in half precision.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float = 0.999
    ) -> None:
        """Start an average.

        Args:
            parameters: names and parameters, such as `program.named_parameters()`; those that do
                not train are left out.
            decay: in [0, 1); about `1 / (1 - decay)` updates are averaged.

        Raises:
            UserError: the decay is out of range.
        """
        if not 0 <= decay < 1:
            raise UserError(f"`ema.decay={decay}` must be in [0, 1)")
        self.decay = decay
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        self.averages = {
            name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' present values into the average; once for each step."""
        for name, average in self.averages.items():
            average.lerp_(self.parameters[name].float(), 1 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it the parameters have the averages' values; afterwards, their own again."""
        with restoring(self.parameters.values()):
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.averages[name])
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name of parameter, float32."""
        return dict(self.averages)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from saved averages.

        Raises:
            UserError: they are of other parameters, or of other shapes.
        """
        if odd := sorted(state_dict.keys() ^ self.averages.keys()):
            raise UserError(f"ema: the saved averages and what trains differ in {odd[0]!r}")
        for name, average in self.averages.items():
            if state_dict[name].shape != average.shape:
                raise UserError(
                    f"ema: the saved average of {name} has shape {tuple(state_dict[name].shape)}, "
                    f"the parameter {tuple(average.shape)}"
                )
            average.copy_(state_dict[name])


@contextmanager
def evaluation_weights(optimizer: Optimizer, ema: EMA | None = None) -> Iterator[None]:
    """Within it the parameters have the values that are to be evaluated and saved.

    Those are the averages of `ema`; or what a schedule-free optimizer (Defazio et al.,
    arXiv:2405.15682) averages; else the parameters' own. Afterwards they train on with the same
    bits as if nothing had been evaluated. The state from which a run is resumed is to be saved
    outside of it.

    Args:
        optimizer: that trains them.
        ema: of the same parameters.
    """
    if ema is not None:
        with ema.swapped():
            yield
    elif hasattr(averaging := _innermost(optimizer), "eval"):
        with restoring([p for group in averaging.param_groups for p in group["params"]]):
            averaging.eval()
            try:
                yield
            finally:
                averaging.train()
    else:
        yield


def start_training(optimizer: Optimizer) -> None:
    """Tell an optimizer that needs to know (a schedule-free one) that steps will follow."""
    if hasattr(averaging := _innermost(optimizer), "train"):
        averaging.train()


@contextmanager
@torch.no_grad()
def restoring(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it, parameters may be changed in place; afterwards they have their values again."""
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, value in kept:
            parameter.copy_(value)


def _innermost(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)
