"""AWQ: weights that meet large inputs are scaled up before they are rounded.

Lin et al., AWQ: Activation-aware Weight Quantization (arXiv:2306.00978). The scales are searched by
torchao's prototype; here is where its inputs come from, and what its scales do to the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graphtune.errors import UserError
from graphtune.fake_quantization import fake_quantize_tokens, fake_quantize_weight
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.passes.qat import run_observing
from graphtune.program import Program
from graphtune.rewrite import Edit
from graphtune.sites import Site, find_sites
from graphtune.torchao_operators import torchao

aten = torch.ops.aten


@dataclass(frozen=True)
class Equalize(Pass):
    """Divides the input of linears by a scale for each channel, and multiplies their weights by it.

    Attributes:
        scales: (in_features,) by the linear's name, above 0.
    """

    scales: Mapping[str, Tensor] = field(default_factory=dict)

    name: ClassVar[str] = "awq"
    stage: ClassVar[Stage] = Stage.QAT
    order: ClassVar[int] = 1
    conflicts: ClassVar[frozenset[str]] = frozenset({"awq", "convert"})

    @property
    def numerics(self) -> Numerics:
        return "lossy"

    def options(self) -> dict[str, object]:
        return {"sites": len(self.scales)}

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        sites = [site for site in edit.sites("linear") if site.name in self.scales]
        for site in sites:
            scale = self.scales[site.name]
            old = edit.parameters[site.parameter]
            weight = (old.detach() * scale).to(old.dtype)
            edit.parameters[site.parameter] = nn.Parameter(weight, old.requires_grad)
            edit.add_buffer(f"{site.name}.input_scale", (1.0 / scale).to(old.dtype))
            reader = site.node
            if site.input.target is fake_quantize_tokens:
                reader = site.input
            x = reader.args[0]
            with edit.after(x, origin=site.node):
                scaled = edit.call(aten.mul.Tensor, x, edit.read(f"{site.name}.input_scale"))
            reader.replace_input_with(x, scaled)
        return sites


def awq(
    program: Program, batches: Iterable[Mapping[str, Tensor]], *, tokens: int = 1024
) -> Program:
    """Choose scales for the linears that `QAT` quantizes, before `Convert` does.

    Args:
        program: with `QAT` applied, adapters merged.
        batches: what the inputs are observed on, as for `qat.observe`.
        tokens: rows of the inputs of each linear that the search looks at, at most.

    Returns:
        A new program. Linears that share their weight with others stay as they are.

    Raises:
        UserError: no linear can be scaled.
    """
    sites = _sites(program)
    if not sites:
        raise UserError("awq: no linear with a scheme of 8da4w, 8da8w, int4 or int8 to scale")
    seen: dict[str, list[Tensor]] = {name: [] for name in sites}

    def keep(node: Any, args: tuple[Any, ...]) -> None:
        name = by_node.get(node)
        if name is not None and sum(map(len, seen[name])) < tokens:
            seen[name].append(args[0].reshape(-1, args[0].shape[-1])[:tokens].clone())

    by_node = {_reader(site): name for name, site in sites.items()}
    run_observing(program, batches, keep)
    parameters = program.all_parameters()
    scales = {}
    for name, site in sites.items():
        bias = None if site.bias is None else parameters[site.bias.target]
        scales[name] = _search(site, parameters[site.parameter], bias, torch.cat(seen.pop(name)))
    return program.apply(Equalize(scales))


def _reader(site: Site) -> Any:
    """The node that takes the linear's input as the layer before made it."""
    return site.input if site.input.target is fake_quantize_tokens else site.node


def _sites(program: Program) -> dict[str, Site]:
    counts: dict[int, int] = {}
    parameters = program.all_parameters()
    for parameter in parameters.values():
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return {
        site.name: site
        for site in find_sites(program.graph)
        if site.kind == "linear"
        and not site.transposed
        and site.node.args[1].target is fake_quantize_weight
        and site.weight.op == "get_attr"
        and counts[id(parameters[site.parameter])] == 1
        and "tensor" not in str(site.input.target)
    }


@torch.no_grad()
def _search(site: Site, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    torchao()
    from torchao.prototype.awq.core import AWQObserver
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )

    _, _, group, bits = site.node.args[1].args[:4]
    dtype, granularity = getattr(torch, f"int{bits}"), PerGroup(group)
    config: Any = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
    if site.input.target is fake_quantize_tokens:
        config = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype, weight_granularity=granularity
        )
    observer = AWQObserver(weight.detach(), bias, config)
    observer(x, x)  # it looks at inputs alone
    return observer.calculate_qparams()
