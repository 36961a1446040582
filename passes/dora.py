"""DoRA: LoRA on the direction of a weight, and a trained magnitude for each output.

Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv:2402.09353). Over a quantized base
it is what is known as QDoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from graphtune.errors import UserError
from graphtune.passes.lora import LoRA, stored_weight
from graphtune.rewrite import Edit
from graphtune.sites import ModuleSite, Site

aten = torch.ops.aten


@dataclass(frozen=True)
class DoRA(LoRA):
    """Replaces a weight `W` by `m * (W + scaling * B A) / |W + scaling * B A|`.

    The norm is of each output's weights and gets no gradient, as in section 4.3 of the paper; `m`
    starts as the norm of `W`, so that the model does not change. The arithmetic is PEFT's, bit
    for bit. Besides LoRA's parameters a site has `<site>.lora_magnitude_vector.<adapter>.weight`
    (out_features,), or (width,) for an embedding. Experts cannot be adapted so.

    With dropout, the base is applied to the dropped input too (a second matmul), as in PEFT.

    Attributes: as those of `LoRA`.
    """

    name: ClassVar[str] = "dora"

    def check_site(self, site: Site | ModuleSite) -> None:
        super().check_site(site)
        if site.kind == "experts":
            raise UserError(
                f"`passes.dora.targets`: {site.name} holds experts, which DoRA cannot adapt; "
                "leave them out, or use lora"
            )

    def factors(self, site: Site) -> tuple[str, ...]:
        magnitude = f"{site.name}.lora_magnitude_vector.{self.adapter}.weight"
        return (*super().factors(site), magnitude)

    def create(self, edit: Edit, site: Site) -> None:
        super().create(edit, site)
        a, b, magnitude = self.factors(site)
        names, weight = stored_weight(edit, site)

        def norm(a: Tensor, b: Tensor, *stored: Tensor) -> tuple[Tensor]:
            return (self._norm(site, weight(*stored), a, b),)

        (value,) = edit.compute((magnitude,), norm, a, b, *names)
        edit.add_parameter(magnitude, value)

    def _norm(self, site: Site, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """|W + scaling * B A| of each output, (out_features,), in the dtype of A."""
        weight = weight.to(a.dtype)
        if site.kind == "embedding":
            return torch.linalg.vector_norm(weight.T + self.scaling * (a.T @ b.T).T, dim=1)
        stored = weight.T if site.transposed else weight
        return torch.linalg.vector_norm(stored + self.scaling * (b @ a), dim=1)

    def adapt(
        self, edit: Edit, site: Site, result: fx.Node, a: fx.Node, b: fx.Node, *more: fx.Node
    ) -> fx.Node:
        weight = edit.cast(site.weight, a.meta["val"].dtype)
        if site.transposed or site.kind == "embedding":
            weight = edit.call(aten.t.default, weight)
        scale = edit.call(aten.div.Tensor, more[0], self._norm_node(edit, site, weight, a, b))
        if site.kind == "embedding":
            rows = edit.call(aten.mul.Tensor, scale, self.update(edit, site, a, b))
            scaled = edit.call(aten.mul.Tensor, rows, self.scaling)
            kept = edit.call(aten.mul.Tensor, scale, result)
            return edit.call(aten.add.Tensor, kept, self.like_module(edit, site, scaled))
        scale = edit.call(aten.view.default, scale, [1, -1])
        x = self.dropped(edit, edit.cast(site.input, a.meta["val"].dtype))
        low = edit.call(aten.linear.default, x, a)
        update = edit.call(aten.mul.Tensor, scale, edit.call(aten.linear.default, low, b))
        update = edit.call(aten.mul.Tensor, update, self.scaling)
        if self.dropout > 0:
            base = edit.call(aten.linear.default, x, weight)
        else:
            base = edit.call(aten.sub.Tensor, result, site.bias) if site.bias else result
        change = edit.call(aten.mul.Tensor, edit.call(aten.sub.Tensor, scale, 1), base)
        return edit.call(aten.add.Tensor, result, edit.call(aten.add.Tensor, change, update))

    def _norm_node(
        self, edit: Edit, site: Site, weight: fx.Node, a: fx.Node, b: fx.Node
    ) -> fx.Node:
        """Insert the norm of the adapted weight; `weight` is (out_features, in_features)."""
        low = edit.call(aten.t.default, a)
        if site.kind == "embedding":
            product = edit.call(aten.matmul.default, low, edit.call(aten.t.default, b))
        else:
            product = edit.call(aten.linear.default, low, b)
        update = edit.call(aten.detach.default, edit.call(aten.t.default, product))
        adapted = edit.call(
            aten.add.Tensor, weight, edit.call(aten.mul.Tensor, update, self.scaling)
        )
        norm = edit.call(aten.linalg_vector_norm.default, adapted, 2, [1])
        return edit.call(aten.detach.default, norm)

    def merged(self, site: Site, weight: Tensor, a: Tensor, b: Tensor, *more: Tensor) -> Tensor:
        """The weight as it is stored, with direction and magnitude folded in."""
        factor = more[0] / self._norm(site, weight, a, b)
        in_rows = not (site.transposed or site.kind == "embedding")
        factor = factor.view(-1, 1) if in_rows else factor.view(1, -1)
        return (factor * (weight + self.delta(site, a, b))).to(weight.dtype)
