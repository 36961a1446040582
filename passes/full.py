"""Full and Freeze: which of the model's own parameters train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from graphtune.passes.adapters import is_adapter_parameter
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.rewrite import Edit
from graphtune.rules import Named, Target, match
from graphtune.sites import Site


@dataclass(frozen=True)
class Full(Pass):
    """Trains the chosen parameters in full, and freezes the model's others.

    Beside `LoRA` or `DoRA` it adds to what trains: adapters on some weights, all of others.

    Attributes:
        targets: rules on the parameters' names (`*.norm.weight`) or their modules' (`*.norm`); by
            default all.
        layers: only in these layers, such as `[0, 8..15]`; None for all.
    """

    targets: tuple[Target, ...] = ("*",)
    layers: tuple[int | str, ...] | None = None

    name: ClassVar[str] = "full"
    stage: ClassVar[Stage] = Stage.ADAPT
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)

    @property
    def numerics(self) -> Numerics:
        return "exact"

    def check(self, model: nn.Module) -> None:
        self._choose(name for name, _ in model.named_parameters(remove_duplicate=False))

    def _choose(self, names: Iterable[str]) -> list[str]:
        """The parameters that a rule matches, by their own name or by their module's."""
        owner: dict[str, list[str]] = {}
        for name in names:
            owner.setdefault(name, []).append(name)
            owner.setdefault(name.rpartition(".")[0], []).append(name)
        places = [Named(name) for name in owner]
        chosen = match(places, self.targets, layers=self.layers, key=f"passes.{self.name}.targets")
        return list(dict.fromkeys(name for place in chosen for name in owner[place]))

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        base = [name for name in edit.parameters if not is_adapter_parameter(name)]
        chosen = self._choose(base)
        edit.set_trainable(base, False)
        edit.set_trainable(chosen, True)
        return _sites_of(edit, chosen)


@dataclass(frozen=True)
class Freeze(Full):
    """Freezes the chosen parameters; the others stay as they are.

    Attributes: as those of `Full`.
    """

    name: ClassVar[str] = "freeze"
    order: ClassVar[int] = 3

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        chosen = self._choose(edit.parameters)
        edit.set_trainable(chosen, False)
        return _sites_of(edit, chosen)


def _sites_of(edit: Edit, names: Iterable[str]) -> list[Site]:
    wanted = set(names)
    return [s for s in edit.sites("linear", "embedding", "experts") if s.parameter in wanted]
