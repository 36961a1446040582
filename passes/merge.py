"""Merge: fold what adapters learned into the weights they adapt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graphtune.errors import UserError
from graphtune.passes.adapters import adapter_names, adapter_of, adapter_pass, strip
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.passes.lora import LoRA, stored_weight
from graphtune.passes.quantize import format_of, store
from graphtune.program import Program
from graphtune.rewrite import Edit
from graphtune.sites import Site


@dataclass(frozen=True)
class Merge(Pass):
    """Replaces each adapted weight by the weight and its adapters in one; no adapter is left.

    The adapters that act are merged, in their order; those that `SetAdapter` switched off are
    dropped. Merged weights are new tensors: the given program keeps the original ones. A weight
    that is tied to another (an adapted output head) is untied, or the update would leak into the
    embedding. A quantized weight is quantized again, which loses part of the update. The ledger's
    figures tell how much: the 2-norm of what is lost, over all such weights, relative to that of
    the update (`lost_of_update`) and to that of the merged weights (`lost_of_weights`).

    Attributes:
        dequantize: give adapted weights that are quantized back in full precision instead.
        keep: remember the given program, for `Unmerge`; its adapted weights stay in memory.
    """

    dequantize: bool = False
    keep: bool = False

    name: ClassVar[str] = "merge"
    stage: ClassVar[Stage] = Stage.EXPORT
    conflicts: ClassVar[frozenset[str]] = frozenset({"convert"})

    @property
    def numerics(self) -> Numerics:
        return "lossy"

    def __call__(self, program: Program) -> Program:
        after = super().__call__(program)
        if self.keep:  # no child module: its parameters are not this program's
            object.__setattr__(after, "unmerged", program)
        return after

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        if not adapter_names(edit.program):
            raise UserError("`passes.merge`: the program has no adapter to merge")
        if any(row.options.get("weights") == "base" for row in edit.program.ledger):
            raise UserError(
                "`passes.merge`: the adapters were trained beside rounded base weights "
                "(`passes.qat.weights=base`), and merged ones would be rounded otherwise; Convert "
                "keeps them apart, and `weights=effective` trains what is merged"
            )
        read = {node.target for node in edit.graph.find_nodes(op="get_attr")}
        adapters = strip(edit)
        loss = _Loss()
        for site in {site.name: site for site in adapters}.values():  # one may be called twice
            self._merge(edit, site, adapters[site], loss)
        for name in [n for n in edit.parameters if adapter_of(n) is not None]:
            value = edit.remove(name)
            module, saved, leaf = name.partition(".modules_to_save.")
            if saved and name in read:
                _set(edit, f"{module}.{leaf.rpartition('.')[2]}", value)
        for name in [n for n in edit.buffers if adapter_of(n) is not None]:
            edit.remove(name)
        edit.figures |= loss.figures()
        edit.info = dataclasses.replace(edit.info, fingerprint=None)  # these are other weights
        return list(adapters)

    def _merge(self, edit: Edit, site: Site, adapters: list[str], loss: _Loss) -> None:
        names, weight = stored_weight(edit, site)
        ones = [_at_site(edit, site, adapter) for adapter in adapters]
        counts = [len(one.factors(site)) for one in ones]

        def merged(*tensors: Tensor) -> Tensor:
            result, rest = weight(*tensors[: len(names)]), tensors[len(names) :]
            for one, count in zip(ones, counts, strict=True):
                result, rest = one.merged(site, result, *rest[:count]), rest[count:]
            return result

        inputs = (*names, *(name for one in ones for name in one.factors(site)))
        kind = format_of(site)
        if kind is not None and not self.dequantize:
            if edit.program.deferred is None:
                before = weight(*map(edit.tensor, names))
                exact = merged(*map(edit.tensor, inputs))
                store(edit, site, kind, merged, inputs)
                loss.add(before, exact, weight(*map(edit.tensor, names)))
            else:
                store(edit, site, kind, merged, inputs)
            return
        (value,) = edit.compute((site.parameter,), lambda *t: (merged(*t),), *inputs)
        _set(edit, site.parameter, value)
        if kind is not None:
            with edit.after(site.weight):
                site.weight.replace_all_uses_with(edit.read(site.parameter))
            for name in names:
                edit.remove(name)


def _at_site(edit: Edit, site: Site, adapter: str) -> LoRA:
    sites = adapter_pass(edit.program, adapter).adapted_sites(edit.graph)
    return next(own for other, own in sites if other.name == site.name)


def _set(edit: Edit, name: str, value: Tensor) -> None:
    trainable = name in edit.parameters and edit.parameters[name].requires_grad
    edit.parameters[name] = nn.Parameter(value.detach(), trainable)


class _Loss:
    """What quantizing merged weights again loses, as sums of squares."""

    def __init__(self) -> None:
        self.lost = self.update = self.weights = 0.0

    @torch.no_grad()
    def add(self, before: Tensor, exact: Tensor, after: Tensor) -> None:
        self.lost += float((after - exact).double().square().sum())
        self.update += float((exact - before).double().square().sum())
        self.weights += float(exact.double().square().sum())

    def figures(self) -> dict[str, float]:
        if self.weights == 0:
            return {}
        of_update = (self.lost / self.update) ** 0.5 if self.update else float("inf")
        return {
            "lost_of_update": of_update,
            "lost_of_weights": (self.lost / self.weights) ** 0.5,
        }


@dataclass(frozen=True)
class Unmerge(Pass):
    """Gives back the program that `Merge(keep=True)` was applied to, to the bit.

    Passes that were applied after the merge are undone with it.
    """

    name: ClassVar[str] = "unmerge"
    stage: ClassVar[Stage] = Stage.EXPORT

    @property
    def numerics(self) -> Numerics:
        return "lossy"

    def __call__(self, program: Program) -> Program:
        if program.unmerged is None:
            raise UserError("`passes.unmerge`: nothing was merged with Merge(keep=True)")
        return program.unmerged
