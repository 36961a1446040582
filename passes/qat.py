"""QAT: train a model to be quantized, by computing with the numbers that integers can hold.

Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference (arXiv:1712.05877). Values and gradients are those of torchao's eager QAT; `Convert` makes
integers of what was trained, with the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from graphtune.errors import UserError
from graphtune.fake_quantization import (
    fake_quantize_tensor,
    fake_quantize_tokens,
    fake_quantize_weight,
)
from graphtune.masks import with_documents
from graphtune.passes.adapters import active_adapters, adapter_pass, last_output
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.passes.quantize import format_of
from graphtune.program import Program
from graphtune.rewrite import Edit, must_recompute
from graphtune.rules import Target, match
from graphtune.sites import ModuleSite, Site, module_sites

ENABLED = "fake_quantization.enabled"  # a buffer, where there is something to switch


class Scheme(NamedTuple):
    """Bits of a weight, and how the input of a linear is quantized to 8 bits, if it is."""

    bits: int
    activation: Literal["dynamic", "static"] | None = None


SCHEMES = {
    "8da4w": Scheme(4, "dynamic"),
    "8da8w": Scheme(8, "dynamic"),
    "int4": Scheme(4),
    "int8": Scheme(8),
    "int8_static": Scheme(8, "static"),
}


@dataclass(frozen=True)
class QAT(Pass):
    """Lets each chosen site compute with weights, and inputs, that are rounded as integers would
    round them; gradients pass the rounding.

    Beside adapters the weights that are rounded are either those that the adapters make
    (`effective`: what is merged and shipped), or the frozen ones alone, with the adapters in
    floating point beside them (`base`). On a program whose weights are quantized already, and
    with DoRA, it is refused.

    Attributes:
        scheme: `8da4w` (4-bit weights; each token of the input in 8 bits, by its own range),
            `8da8w`, `int4` and `int8` (weights alone; also for embeddings), or `int8_static`
            (8-bit weights, the input in 8 bits by one range, which is observed, then frozen).
        group_size: weights of a row that share a scale; 0 for the whole row; None for 32 of 4-bit
            weights and the row of 8-bit ones.
        targets: rules, see `graphtune.rules.match`; a rule may override scheme and group_size.
            By default all linears and experts but the output head and routers.
        layers: only in these layers, such as `[0, 8..15]`; None for all.
        scale_dtype: of the scales of weights, `weight` (the weight's own, as torchao's `QATConfig`
            has it) or `bfloat16`, in which XNNPACK keeps those of groups; None for bfloat16 with
            `8da4w`, so that a device computes what was trained.
        weights: which weights of adapted sites, `effective` or `base`.
        enabled_from_step: steps of training that go by without it.
        observe_steps: steps, from the one when it begins, whose batches `int8_static` takes its
            ranges from.
    """

    scheme: Literal["8da4w", "8da8w", "int4", "int8", "int8_static"] = "8da4w"
    group_size: int | None = None
    targets: tuple[Target, ...] = ("all-linear",)
    layers: tuple[int | str, ...] | None = None
    scale_dtype: Literal["weight", "bfloat16"] | None = None
    weights: Literal["effective", "base"] = "effective"
    enabled_from_step: int = 0
    observe_steps: int = 16

    name: ClassVar[str] = "qat"
    stage: ClassVar[Stage] = Stage.QAT
    conflicts: ClassVar[frozenset[str]] = frozenset({"qat", "convert", "dora"})
    site_options: ClassVar[tuple[str, ...]] = ("scheme", "group_size")

    def __post_init__(self) -> None:
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)
        self._require(self.scheme in SCHEMES, "scheme", f"one of {', '.join(SCHEMES)}")
        self._require(
            self.scale_dtype in ("weight", "bfloat16", None), "scale_dtype", "weight or bfloat16"
        )
        self._require(self.weights in ("effective", "base"), "weights", "effective or base")
        for option, least in (("group_size", 0), ("enabled_from_step", 0), ("observe_steps", 1)):
            value = getattr(self, option)
            self._require(value is None or value >= least, option, f"at least {least}")

    def _require(self, right: bool, option: str, must: str) -> None:
        if not right:
            raise UserError(f"`passes.qat.{option}={getattr(self, option)}` must be {must}")

    @property
    def numerics(self) -> Numerics:
        return "lossy"

    @property
    def badge(self) -> str:
        return f"qat {self.scheme}"

    def check(self, model: nn.Module) -> None:
        places = list(module_sites(model))
        chosen = match(places, self.targets, layers=self.layers, key="passes.qat.targets")
        for place in places:
            if place.name in chosen:
                self.at(chosen[place.name]).check_site(place)

    def group(self, site: Site | ModuleSite) -> int:
        """How many weights of a site share a scale."""
        default = 32 if SCHEMES[self.scheme].bits == 4 else 0
        return (default if self.group_size is None else self.group_size) or site.shape[-1]

    @property
    def _bfloat16_scale(self) -> bool:
        return (self.scale_dtype or ("bfloat16" if self.scheme == "8da4w" else "")) == "bfloat16"

    def check_site(self, site: Site | ModuleSite) -> None:
        """Raise UserError if a site cannot be quantized so."""
        width, group = site.shape[-1], self.group(site)
        if width % group:
            fitting = [size for size in (256, 128, 64, 32, 16, 8) if width % size == 0]
            raise UserError(
                f"`passes.qat.group_size={group}` does not divide the {width} weights of a row of "
                f"{site.name}; choose one of {', '.join(map(str, [*fitting, 0]))}, by a rule"
            )
        if site.kind == "embedding" and SCHEMES[self.scheme].activation is not None:
            raise UserError(
                f"`passes.qat.scheme={self.scheme}` quantizes inputs, and those of {site.name} are "
                "token ids; give it a rule with `scheme: int4` or `scheme: int8`"
            )

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        places = edit.sites("linear", "embedding", "experts")
        chosen = match(places, self.targets, layers=self.layers, key="passes.qat.targets")
        sites = [site for site in places if site.name in chosen]
        if self.enabled_from_step:
            _add_zeros(edit, ENABLED, (), torch.bool)
        for site in sites:
            own = self.at(chosen[site.name])
            own.check_site(site)
            self._check_adapters(edit, site)
            own._quantize_weight(edit, site)
            own._quantize_input(edit, site)
        return sites

    def _check_adapters(self, edit: Edit, site: Site) -> None:
        if format_of(site) is not None:
            raise UserError(
                f"`passes.qat.targets`: the weight of {site.name} is quantized already; leave out "
                "`passes.quantize` there (QAT trains with a base in full precision)"
            )
        if self.weights == "base":
            return
        for adapter in active_adapters(site):
            if adapter_pass(edit.program, adapter).dropout > 0:
                raise UserError(
                    f"`passes.qat.weights=effective` rounds the weights that adapter {adapter!r} "
                    f"makes, where its input cannot be dropped; set `passes.lora.dropout=0`, or "
                    "`passes.qat.weights=base`"
                )

    def _quantize_weight(self, edit: Edit, site: Site) -> None:
        adapters = active_adapters(site) if self.weights == "effective" else []
        reader = site.node  # experts read a weight transposed
        while site.weight not in reader.all_input_nodes:
            reader = reader.args[1]
        weight = site.weight
        for adapter in adapters:
            weight = _merged(edit, site, weight, adapter)
        if adapters:
            last_output(site).replace_all_uses_with(site.output)
        bits, axis = SCHEMES[self.scheme].bits, -2 if site.transposed else -1
        with edit.after(reader.prev, origin=site.node, parameter=site.parameter):
            layout = (axis, self.group(site), bits, self._bfloat16_scale)
            value = edit.call(fake_quantize_weight, weight, *layout, **_flag(edit))
            must_recompute(value)
        reader.replace_input_with(site.weight, value)

    def _quantize_input(self, edit: Edit, site: Site) -> None:
        kind, x = SCHEMES[self.scheme].activation, site.input
        if kind is None:
            return
        # Right before its use, as an eager module does it: gradients add up in the same order.
        with edit.after(site.node.prev, origin=site.node):
            if kind == "dynamic":
                value = edit.call(fake_quantize_tokens, x, **_flag(edit))
            else:
                name = observed(site.name)
                _add_zeros(edit, name, (2,), torch.float32)
                value = edit.call(fake_quantize_tensor, x, edit.read(name), **_flag(edit))
        site.node.replace_input_with(x, value)


def observed(site: str) -> str:
    """Name of the buffer with the least and the largest input of a linear that is `int8_static`."""
    return f"{site}_observed_input"


def ranges(program: Program) -> dict[str, Tensor]:
    """The ranges of inputs that `int8_static` has observed, float32 (2,), by the buffer's name."""
    nodes = (n for n in program.graph.nodes if n.target is fake_quantize_tensor)
    return {name: program.get_buffer(name) for name in (node.args[1].target for node in nodes)}


def _add_zeros(edit: Edit, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def zeros(device: torch.device) -> tuple[Tensor]:
        return (torch.zeros(shape, dtype=dtype, device=device),)

    # No part of the model's state_dict: these are for training, and for Convert.
    edit.add_buffer(name, *edit.compute((name,), zeros), persistent=False)


def _flag(edit: Edit) -> dict[str, fx.Node]:
    return {"enabled": edit.read(ENABLED)} if ENABLED in edit.buffers else {}


def _merged(edit: Edit, site: Site, weight: fx.Node, adapter: str) -> fx.Node:
    """Insert the weight that an adapter makes of a weight."""
    rules = adapter_pass(edit.program, adapter).adapted_sites(edit.graph)
    own = next(one for other, one in rules if other.name == site.name)
    with edit.after(weight, origin=site.node, adapter=adapter, parameter=site.parameter):
        a, b = (edit.read(name) for name in own.factors(site))
        merged = own.merged_node(edit, site, weight, a, b)
        merged.meta["custom"]["merges"] = adapter
    return merged


def at_step(program: Program, step: int, batches: Iterable[Mapping[str, Tensor]] = ()) -> None:
    """Do what QAT asks for before a step of training is taken; nothing without it.

    Fake quantization begins, and the ranges of inputs that are quantized by one are observed.
    Both are buffers, so that they are saved with the state of a run, and a compiled step stays as
    it is.

    Args:
        step: number of steps taken so far.
        batches: of the step, as for `engine.TrainStep`.
    """
    for row in program.ledger:
        if row.name == "qat":
            since = step - row.options["enabled_from_step"]
            if row.options["enabled_from_step"]:
                program.get_buffer(ENABLED).fill_(since >= 0)
            if 0 <= since < row.options["observe_steps"]:
                observe(program, batches)


def observe(program: Program, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Widen the ranges of `int8_static` to hold what batches bring; nothing without such sites.

    Args:
        batches: `input_ids`, and optionally `attention_mask` and `position_ids`.
    """

    def widen(node: fx.Node, args: tuple[Any, ...]) -> None:
        if node.target is fake_quantize_tensor:
            x, known = args[:2]
            low, high = x.aminmax()
            known.copy_(torch.stack([torch.minimum(known[0], low), torch.maximum(known[1], high)]))

    if ranges(program):
        run_observing(program, batches, widen)


@torch.no_grad()
def run_observing(
    program: Program,
    batches: Iterable[Mapping[str, Tensor]],
    look: Callable[[fx.Node, tuple[Any, ...]], None],
) -> None:
    """Run a program on batches, without dropout.

    Args:
        look: called with each call of an operator and its arguments, before it runs.
    """
    observing = program.running(_Observer(program.graph_module, look).run)
    was_training = program.training
    program.eval()
    for batch in batches:
        batch = with_documents(observing, batch)
        observing(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"))
    program.train(was_training)


class _Observer(fx.Interpreter):
    """Runs a graph, and shows what its operators are given."""

    def __init__(self, module: fx.GraphModule, look: Callable[..., None]) -> None:
        super().__init__(module)
        self.look = look

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function":
            self.look(n, self.fetch_args_kwargs_from_env(n)[0])
        return super().run_node(n)
