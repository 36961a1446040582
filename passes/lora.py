"""LoRA: a trainable low-rank update beside frozen weights.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685);
rank-stabilised scaling: Kalajdzievski (arXiv:2312.03732);
PiSSA: Meng et al. (arXiv:2404.02948).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from graphtune.errors import UserError
from graphtune.passes.adapters import (
    adapter_names,
    is_adapter_parameter,
    last_output,
    mark_output,
    save_modules,
)
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.rewrite import Edit, constants_of, evaluate
from graphtune.rules import Target, match
from graphtune.sites import ModuleSite, Site, find_sites, module_sites

aten = torch.ops.aten


@dataclass(frozen=True)
class LoRA(Pass):
    """Adds `scaling * B(A(dropout(x)))` to the output of each chosen site, and freezes the rest.

    The arithmetic is PEFT's, bit for bit (but for experts, see `docs/passes/adapters.md`), and the
    new parameters are called as in a live PEFT model: `<linear>.lora_A.<adapter>.weight`
    (rank, in_features) and `<linear>.lora_B.<adapter>.weight` (out_features, rank);
    `<embedding>.lora_embedding_A.<adapter>` (rank, rows) and `..._B.<adapter>` (width, rank);
    `<experts>.<parameter>_lora_A.<adapter>.weight` (rank * experts, in_features) and
    `..._lora_B.<adapter>.weight` (out_features, rank * experts).

    Attributes:
        rank: rank of the update, at least 1.
        alpha: the update is scaled by `alpha / rank`, or `alpha / sqrt(rank)` with `rslora`.
        dropout: probability with which an input of A is dropped in training. Embeddings and
            experts have no dropout, as in PEFT.
        targets: rules, see `graphtune.rules.match`; a rule may override rank, alpha, dropout,
            rslora and init. By default all linears and experts but the output head and routers.
        layers: only in these layers, such as `[0, 8..15]`; None for all.
        rslora: rank-stabilised scaling.
        init: `kaiming` (uniform A, zero B: PEFT's default), `gaussian` (A with standard deviation
            1 / rank, zero B), `orthogonal` (A and B random, with a product of zero), `pissa` (the
            leading singular vectors of the weight, which keeps the residual) or `pissa_niter_N`
            (the same by N iterations of a randomised SVD).
        bias: which biases of the model train too: `none`, `all`, or `lora_only` (those of adapted
            linears).
        modules_to_save: modules (rules as for `targets`) that train in full, as copies, and are
            saved with the adapter.
        dtype: of the adapter; `float32` also over half-precision weights, as PEFT does, or `base`.
        adapter: its name. Several adapters on one program add up; see `SetAdapter`.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[Target, ...] = ("all-linear",)
    layers: tuple[int | str, ...] | None = None
    rslora: bool = False
    init: str = "kaiming"
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] = ()
    dtype: Literal["float32", "base"] = "float32"
    adapter: str = "default"

    name: ClassVar[str] = "lora"
    stage: ClassVar[Stage] = Stage.ADAPT
    conflicts: ClassVar[frozenset[str]] = frozenset({"qat", "convert"})
    site_options: ClassVar[tuple[str, ...]] = ("rank", "alpha", "dropout", "rslora", "init")

    def __post_init__(self) -> None:
        for field in ("targets", "modules_to_save"):
            value: Any = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        self._require(self.rank >= 1, "rank", "at least 1")
        self._require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        kind, _, iterations = self.init.partition("_niter_")
        known = kind in ("kaiming", "gaussian", "orthogonal", "pissa") and (
            not iterations or (kind == "pissa" and iterations.isdigit())
        )
        kinds = "one of kaiming, gaussian, orthogonal, pissa, pissa_niter_N"
        self._require(known, "init", kinds)
        self._require(kind != "orthogonal" or self.rank % 2 == 0, "rank", "even for orthogonal")
        self._require(self.bias in ("none", "all", "lora_only"), "bias", "none, all or lora_only")
        self._require(self.dtype in ("float32", "base"), "dtype", "float32 or base")
        self._require(self.adapter.isidentifier(), "adapter", "a name, such as default")

    def _require(self, right: bool, option: str, must: str) -> None:
        if not right:
            raise UserError(f"`passes.{self.name}.{option}={getattr(self, option)}` must be {must}")

    @property
    def numerics(self) -> Numerics:
        kept = all(
            one.init in ("kaiming", "gaussian")
            for one in (self, *(self.at(_options(t)) for t in self.targets))
        )
        return "identity_at_init" if kept else "lossy"

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def badge(self) -> str:
        name = "" if self.adapter == "default" else f" {self.adapter}"
        return f"{self.name} r{self.rank} α{self.alpha:g}{name}"

    def check(self, model: nn.Module) -> None:
        places = list(module_sites(model))
        for name, own in self._choose(places).items():
            own.check_site(next(place for place in places if place.name == name))

    def _choose(self, places: Sequence[Site] | Sequence[ModuleSite]) -> dict[str, LoRA]:
        """The sites by name, each with the options that hold there."""
        chosen = match(places, self.targets, layers=self.layers, key=f"passes.{self.name}.targets")
        return {name: self.at(overrides) for name, overrides in chosen.items()}

    def check_site(self, site: Site | ModuleSite) -> None:
        """Raise UserError if the site cannot be adapted so."""
        rows, columns = site.shape[-2:]
        if self.rank > min(rows, columns):
            raise UserError(
                f"`passes.{self.name}.rank={self.rank}` is larger than the {rows}x{columns} weight "
                f"of {site.name}; choose at most {min(rows, columns)}"
            )
        if self.init not in ("kaiming", "gaussian") and site.kind != "linear":
            raise UserError(
                f"`passes.{self.name}.init={self.init}` is for linears, and {site.name} is an "
                f"{site.kind} site; leave it out of `targets` or use kaiming"
            )
        if isinstance(site, ModuleSite) or site.weight.op == "get_attr":
            return
        if site.kind == "embedding":
            raise UserError(
                f"`passes.{self.name}.targets`: {site.name} is a quantized embedding, which cannot "
                f"be adapted; leave it out of the targets of {self.name} or of quantize"
            )
        if self.init.startswith("pissa"):
            raise UserError(
                f"`passes.{self.name}.init={self.init}` changes the base weight, and that of "
                f"{site.name} is quantized; use kaiming, or do not quantize it"
            )

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        if self.adapter in adapter_names(edit.program):
            raise UserError(
                f"`passes.{self.name}.adapter={self.adapter}`: the program has an adapter of that "
                f"name, as two on one site would need; give this one another name"
            )
        sites = self.adapted_sites(edit.graph)
        if "full" not in [row.name for row in edit.program.ledger]:
            base = [name for name in edit.parameters if not is_adapter_parameter(name)]
            edit.set_trainable(base, False)
        for site, own in sites:
            own.check_site(site)
            if self.factors(site)[0] not in edit.parameters:  # a module may be called twice
                own.create(edit, site)
            own.insert(edit, site)
        self._train_biases(edit, [site for site, _ in sites])
        save_modules(edit, self.modules_to_save, self.adapter, key=f"passes.{self.name}")
        return [site for site, _ in sites]

    def adapted_sites(self, graph: fx.Graph) -> list[tuple[Site, LoRA]]:
        """The sites that the rules choose, each with the options that hold there."""
        places = [site for site in find_sites(graph) if site.kind != "attention"]
        chosen = self._choose(places)
        return [(site, chosen[site.name]) for site in places if site.name in chosen]

    def _train_biases(self, edit: Edit, sites: Sequence[Site]) -> None:
        biases = [name for name in edit.parameters if name.rpartition(".")[2] == "bias"]
        if self.bias == "lora_only":
            adapted = {f"{site.name}.bias" for site in sites}
            biases = [name for name in biases if name in adapted]
        if self.bias != "none":
            edit.set_trainable(biases, True, copy=True)

    # What LoRA and its variants do at one site.

    def factors(self, site: Site) -> tuple[str, ...]:
        """Names of the parameters of the adapter at a site: A, B, and what a variant adds."""
        if site.kind == "embedding":
            return tuple(f"{site.name}.lora_embedding_{m}.{self.adapter}" for m in "AB")
        prefix = f"{site.name}_" if site.kind == "experts" else f"{site.name}."
        return tuple(f"{prefix}lora_{m}.{self.adapter}.weight" for m in "AB")

    def create(self, edit: Edit, site: Site) -> None:
        """Add the parameters of a site."""
        a, b = self.factors(site)[:2]
        dtype = torch.float32 if self.dtype == "float32" else site.weight.meta["val"].dtype
        if self.init.startswith("pissa"):
            # The residual is the base from now on; the start is what an export subtracts.
            outputs = (a, b, site.parameter, initial(a), initial(b))
            values = edit.compute(outputs, self._principal(site, dtype), site.parameter)
            weight = edit.parameters[site.parameter]
            edit.parameters[site.parameter] = nn.Parameter(values[2], weight.requires_grad)
            edit.add_buffer(initial(a), values[3])
            edit.add_buffer(initial(b), values[4])
        else:
            values = edit.compute((a, b), self._start(site, dtype))
        edit.add_parameter(a, values[0])
        edit.add_parameter(b, values[1])

    def _start(self, site: Site, dtype: torch.dtype) -> Any:
        """What makes A and B, drawing random numbers in the order in which PEFT does."""
        experts = site.shape[0] if site.kind == "experts" else 1
        rows, columns = site.shape[-2:]

        def start(device: torch.device) -> tuple[Tensor, Tensor]:
            if site.kind == "embedding":
                b = torch.empty(columns, self.rank, device=device, dtype=dtype)
                return b.new_zeros(self.rank, rows), nn.init.normal_(b)
            a = torch.empty(self.rank * experts, columns, device=device, dtype=dtype)
            b = a.new_zeros(rows, self.rank * experts)
            if self.init == "orthogonal":
                a, b = self._orthogonal(a, b)
            elif self.init == "gaussian":
                nn.init.normal_(a, std=1 / self.rank)
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            return a, b

        return start

    def _orthogonal(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of random directions in two halves of the rank, so that B A is zero."""
        q, _ = torch.linalg.qr(torch.randn(self.rank, self.rank, device=a.device))
        half = self.rank // 2
        first = torch.randn(a.shape[1], half, device=a.device).mm(q[0::2]).T / 10
        second = torch.randn(half, b.shape[0], device=a.device).T.mm(q[1::2]) / 10
        return first.contiguous().to(a.dtype), second.contiguous().to(b.dtype)

    def _principal(self, site: Site, dtype: torch.dtype) -> Any:
        """What splits a weight into its principal part, B A, and the residual."""

        def split(stored: Tensor) -> tuple[Tensor, ...]:
            weight = (stored.T if site.transposed else stored).float()
            if "_niter_" in self.init:
                iterations = int(self.init.rpartition("_")[2])
                u, s, v = torch.svd_lowrank(weight, self.rank, niter=iterations)
                vh = v.T
            else:
                u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            root = torch.diag(torch.sqrt(s[: self.rank] / self.scaling))
            a, b = root @ vh[: self.rank], u[:, : self.rank] @ root
            rest = (weight - self.scaling * b @ a).to(stored.dtype)
            a, b, rest = a.to(dtype), b.to(dtype), rest.T if site.transposed else rest
            return a, b, rest, a.clone(), b.clone()

        return split

    def insert(self, edit: Edit, site: Site) -> None:
        """Let the graph use the adapter at a site, after what other adapters do there."""
        result = last_output(site)
        with edit.after(result, adapter=self.adapter):
            names = self.factors(site)
            out = self.adapt(edit, site, result, *(edit.read(name) for name in names))
            out = mark_output(edit.cast(out, result.meta["val"].dtype))
            edit.replace_uses(result, out)

    def adapt(
        self, edit: Edit, site: Site, result: fx.Node, a: fx.Node, b: fx.Node, *more: fx.Node
    ) -> fx.Node:
        """Insert what makes the new result of a site out of its present one."""
        scaled = edit.call(aten.mul.Tensor, self.update(edit, site, a, b), self.scaling)
        return edit.call(aten.add.Tensor, result, self.like_module(edit, site, scaled))

    def update(self, edit: Edit, site: Site, a: fx.Node, b: fx.Node) -> fx.Node:
        """Insert `B(A(dropout(x)))`, not yet scaled."""
        if site.kind == "embedding":
            a, b = (edit.call(aten.t.default, one) for one in (a, b))
            rows = edit.call(aten.embedding.default, a, *site.node.args[1:])
            return edit.call(aten.matmul.default, rows, b)
        x = edit.cast(site.input, a.meta["val"].dtype)
        if site.kind == "experts":
            low = self._grouped(edit, site, x, self._stack(edit, site, a))
            return self._grouped(edit, site, low, self._stack(edit, site, b))
        x = self.dropped(edit, x)
        return edit.call(aten.linear.default, edit.call(aten.linear.default, x, a), b)

    def dropped(self, edit: Edit, x: fx.Node) -> fx.Node:
        if self.dropout == 0:
            return x
        return edit.call(aten.dropout.default, x, self.dropout, edit.read_training())

    @staticmethod
    def like_module(edit: Edit, site: Site, update: fx.Node) -> fx.Node:
        """Do to an update what an embedding's module does to its rows."""
        before = site.node
        for node in site.tail:
            rest = [update if argument is before else argument for argument in node.args]
            update, before = edit.call(node.target, *rest, **node.kwargs), node
        return update

    def _stack(self, edit: Edit, site: Site, factor: fx.Node) -> fx.Node:
        """A or B of all experts as (experts, in, out), from how PEFT lays them out."""
        experts = site.shape[0]
        if factor.meta["val"].shape[0] == self.rank * experts:  # A: (experts * rank, in)
            stack = edit.call(aten.view.default, factor, [experts, self.rank, -1])
            return edit.call(aten.transpose.int, stack, 1, 2)
        stack = edit.call(aten.view.default, factor, [-1, self.rank, experts])
        return edit.call(aten.permute.default, stack, [2, 1, 0])

    @staticmethod
    def _grouped(edit: Edit, site: Site, x: fx.Node, stack: fx.Node) -> fx.Node:
        return edit.call(site.node.target, x, stack, *site.node.args[2:], **site.node.kwargs)

    def merged(self, site: Site, weight: Tensor, a: Tensor, b: Tensor, *more: Tensor) -> Tensor:
        """The weight as it is stored, with the adapter folded in."""
        return (weight + self.delta(site, a, b)).to(weight.dtype)

    def delta(self, site: Site, a: Tensor, b: Tensor) -> Tensor:
        """`scaling * B A` in the layout of the stored weight."""
        if site.kind == "experts":
            experts = site.shape[0]
            a, b = a.view(experts, self.rank, -1), b.view(-1, self.rank, experts)
            layout = "o r e, e r i -> e i o" if site.transposed else "o r e, e r i -> e o i"
            return torch.einsum(layout, b, a) * self.scaling
        update = b @ a
        return (update.T if site.transposed or site.kind == "embedding" else update) * self.scaling

    def merged_node(
        self, edit: Edit, site: Site, weight: fx.Node, a: fx.Node, b: fx.Node
    ) -> fx.Node:
        """Insert what `merged` computes."""
        if site.kind == "experts":
            experts = site.shape[0]
            a = edit.call(aten.view.default, a, [experts, self.rank, -1])
            b = edit.call(aten.view.default, b, [-1, self.rank, experts])
            layout = "ore,eri->eio" if site.transposed else "ore,eri->eoi"
            update = edit.call(aten.einsum.default, layout, [b, a])
        else:
            update = edit.call(aten.matmul.default, b, a)
            if site.transposed or site.kind == "embedding":
                update = edit.call(aten.t.default, update)
        scaled = edit.call(aten.mul.Tensor, update, self.scaling)
        merged = edit.call(aten.add.Tensor, weight, scaled)
        return edit.cast(merged, weight.meta["val"].dtype)


def initial(name: str) -> str:
    """Name of the buffer that keeps where PiSSA started a parameter."""
    return name.removesuffix(".weight") + ".initial"


def stored_weight(edit: Edit, site: Site) -> tuple[tuple[str, ...], Any]:
    """Names of the tensors that a site's weight is made of, and what makes it."""
    names = constants_of(site.weight)
    assert names is not None, f"the weight of {site.name} depends on the input"
    node = site.weight
    return names, lambda *tensors: evaluate(node, dict(zip(names, tensors, strict=True)))


def _options(target: Target) -> dict[str, Any]:
    if isinstance(target, str):
        return {}
    return {k: v for k, v in target.items() if k not in ("sites", "layers", "skip")}
