"""Parameters that train at a rate, or with a weight decay, of their own.

LoRA+ (Hayou et al., arXiv:2402.12354) is one such group, `*.lora_B.*` with an `lr_ratio` of 16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphtune.rules import Named, match


@dataclass(frozen=True)
class ParameterGroup:
    """What holds for some parameters instead of the optimizer's own options.

    Attributes:
        parameters: patterns on the parameters' names, see `graphtune.rules.match`.
        lr_ratio: their learning rate, as a multiple of the optimizer's.
        weight_decay: their weight decay; None for the optimizer's.
    """

    parameters: tuple[str, ...]
    lr_ratio: float = 1.0
    weight_decay: float | None = None


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    groups: Sequence[ParameterGroup],
    *,
    lr: float,
    key: str = "parameter_groups",
) -> list[dict[str, Any]]:
    """What to give an optimizer instead of a list of parameters.

    Args:
        parameters: names and parameters, such as `program.named_parameters()`; those that do
            not train are left out.
        groups: the first that matches a parameter holds for it; what none matches comes last,
            under the optimizer's own options.
        lr: the optimizer's learning rate.
        key: the config key that errors name.

    Returns:
        One mapping for each group that has parameters, with `params`, pairs of name and
        parameter, and what differs.

    Raises:
        UserError: a pattern matches no parameter that trains.
    """
    left = {name: parameter for name, parameter in parameters if parameter.requires_grad}
    names = [Named(name) for name in left]
    made = []
    for index, group in enumerate(groups):
        chosen = match(names, group.parameters, key=f"{key}[{index}].parameters")
        own = [(name, left.pop(name)) for name in chosen if name in left]
        if own:
            made.append({"params": own, **_options(group, lr)})
    return [*made, {"params": list(left.items())}] if left else made


def _options(group: ParameterGroup, lr: float) -> Mapping[str, float]:
    decay = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
    return {"lr": lr * group.lr_ratio, **decay}
