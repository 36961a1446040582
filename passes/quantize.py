"""Quantize: keep frozen weights in 4 or 8 bits, and give them back where they are used.

NF4 with double quantization: Dettmers et al., QLoRA (arXiv:2305.14314). `Quantize` and `LoRA`
together are QLoRA, `Quantize` and `DoRA` QDoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from graphtune.errors import UserError
from graphtune.passes.adapters import active_adapters
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.quantization import FORMATS, Format
from graphtune.rewrite import Edit, must_recompute
from graphtune.rules import Target, match
from graphtune.sites import ModuleSite, Site, module_sites


@dataclass(frozen=True)
class Quantize(Pass):
    """Stores the weight of each chosen site in a few bits; the operator that gives it back comes
    before its use.

    What is stored are plain buffers beside where the weight was, such as `q_proj.weight_nf4`. The
    weights do not train any more. In a compiled step a dequantized weight is computed again in
    the backward pass, never kept for it. On a program whose weights are not loaded yet, each
    weight is quantized when it arrives, so that the model never exists in full precision.

    Attributes:
        format: `nf4` (4.13 bits per weight), `int8` (one scale per row), or `int4` (groups of
            32 weights with a scale).
        targets: rules, see `graphtune.rules.match`; a rule may override format. By default all
            linears and experts but the output head and routers.
        layers: only in these layers, such as `[0, 8..15]`; None for all.
    """

    format: Literal["nf4", "int8", "int4"] = "nf4"
    targets: tuple[Target, ...] = ("all-linear",)
    layers: tuple[int | str, ...] | None = None

    name: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    site_options: ClassVar[tuple[str, ...]] = ("format",)

    def __post_init__(self) -> None:
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)
        if self.format not in FORMATS:
            raise UserError(
                f"`passes.quantize.format={self.format}` must be one of {', '.join(FORMATS)}"
            )

    @property
    def numerics(self) -> Numerics:
        return "lossy"

    @property
    def badge(self) -> str:
        return self.format

    def check(self, model: nn.Module) -> None:
        places = list(module_sites(model))
        chosen = match(places, self.targets, layers=self.layers, key="passes.quantize.targets")
        for place in places:
            if place.name in chosen:
                self.at(chosen[place.name])._check_shape(place)

    def _check_shape(self, site: Site | ModuleSite) -> None:
        try:
            FORMATS[self.format]().check(site.stored_shape)
        except ValueError as error:
            raise UserError(
                f"`passes.quantize.format={self.format}`: {site.name}: {error}"
            ) from None

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        places = edit.sites("linear", "embedding", "experts")
        chosen = match(places, self.targets, layers=self.layers, key="passes.quantize.targets")
        sites = [site for site in places if site.name in chosen]
        for site in sites:
            own = self.at(chosen[site.name])
            own._check_shape(site)
            self._check_site(site)
            kind = FORMATS[own.format]()
            if site.parameter in edit.parameters:  # else done: a module may be called twice
                store(edit, site, kind, lambda weight: weight, (site.parameter,))
                edit.remove(site.parameter)
            with edit.after(site.weight, origin=site.node, parameter=site.parameter, format=kind):
                _read(edit, site, kind)
        return sites

    @staticmethod
    def _check_site(site: Site) -> None:
        if adapters := active_adapters(site):
            raise UserError(
                f"`passes.quantize.targets`: {site.name} carries the adapter {adapters[0]!r} "
                "already; give both passes to one `apply`, which quantizes first"
            )
        if format_of(site) is not None:
            raise UserError(f"`passes.quantize.targets`: {site.name} is quantized already")


def format_of(site: Site) -> Format | None:
    """How a site's weight is stored, or None for a plain one."""
    custom = site.weight.meta.get("custom", {}) if site.weight is not None else {}
    return custom.get("format")


def store(
    edit: Edit,
    site: Site,
    kind: Format,
    weight: Callable[..., Tensor],
    inputs: tuple[str, ...],
) -> None:
    """Compute a weight from tensors of the program, and keep it quantized in buffers."""
    like = torch.empty(site.weight.meta["val"].shape, device="meta")
    names = [f"{site.parameter}_{suffix}" for suffix in kind.quantize(like)]

    def quantize(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(kind.quantize(weight(*tensors)).values())

    for name, value in zip(names, edit.compute(names, quantize, *inputs), strict=True):
        edit.add_buffer(name, value)


def _read(edit: Edit, site: Site, kind: Format) -> None:
    """Let a site use what `store` kept, instead of its weight."""
    before = site.weight.meta["val"]
    suffixes = kind.quantize(torch.empty(before.shape, device="meta"))
    packed = {suffix: edit.read(f"{site.parameter}_{suffix}") for suffix in suffixes}
    arguments = kind.arguments(packed, list(before.shape), before.dtype)
    value = edit.call(kind.op, *arguments)
    must_recompute(value)
    site.weight.replace_all_uses_with(value)
