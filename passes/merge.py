"""Merge: fold what adapters learned into the weights they adapt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from graphtune.errors import UserError
from graphtune.passes.base import Pass, Stage
from graphtune.passes.lora import adapted
from graphtune.rewrite import Edit
from graphtune.sites import Site


@dataclass(frozen=True)
class Merge(Pass):
    """Replaces each adapted weight `W` by `W + scaling * B A`; no adapter node is left.

    The adapters' parameters go, and the merged weights are new tensors: the given program keeps
    the original ones. A weight that is tied to another (an adapted output head) is untied, or
    the update would leak into the embedding.
    """

    name: ClassVar[str] = "merge"
    stage: ClassVar[Stage] = Stage.EXPORT
    numerics: ClassVar[Literal["exact", "identity_at_init", "lossy"]] = "lossy"

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        linears = {site.node: site for site in edit.sites("linear")}
        found = list(adapted(edit.graph))
        if not found:
            raise UserError("`passes.merge`: the program has no adapter to merge")
        for adapter in found:
            site = linears[adapter.base]
            adapter.output.replace_all_uses_with(adapter.base)
            if adapter.a not in edit.parameters:  # merged already: a module that is called twice
                continue
            a, b = edit.parameters.pop(adapter.a), edit.parameters.pop(adapter.b)
            weight = edit.parameters[f"{site.name}.weight"]
            edit.parameters[f"{site.name}.weight"] = self._merged(
                weight, a, b, adapter.scaling, site
            )
        return [linears[adapter.base] for adapter in found]

    @staticmethod
    @torch.no_grad()
    def _merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float, site: Site) -> nn.Parameter:
        update = b @ a
        update = (update.T if site.transposed else update) * scaling
        return nn.Parameter(weight + update, requires_grad=weight.requires_grad)
