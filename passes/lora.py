"""LoRA: a trainable low-rank update beside frozen linears.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685);
rank-stabilised scaling: Kalajdzievski (arXiv:2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from graphtune.errors import UserError
from graphtune.passes.base import Pass, Stage
from graphtune.rewrite import Edit, written_by
from graphtune.sites import Site, match, module_of, output_head

aten = torch.ops.aten


@dataclass(frozen=True)
class LoRA(Pass):
    """Adds `scaling * B(A(dropout(x)))` to the output of each chosen linear, and freezes the rest.

    The arithmetic is PEFT's, bit for bit. The new parameters are called as in a PEFT checkpoint,
    `<site>.lora_A.weight` (rank, in_features) and `<site>.lora_B.weight` (out_features, rank).

    Attributes:
        rank: rank of the update, at least 1.
        alpha: the update is scaled by `alpha / rank`, or `alpha / sqrt(rank)` with `rslora`.
        dropout: probability with which an input of A is dropped in training.
        targets: which linears, see `graphtune.sites.select`; by default all but the output head.
        rslora: rank-stabilised scaling.
        init: how A starts, `kaiming` (uniform, as PEFT's default) or `gaussian` (standard
            deviation 1 / rank). B starts at zero, so that the model does not change.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False
    init: Literal["kaiming", "gaussian"] = "kaiming"

    name: ClassVar[str] = "lora"
    stage: ClassVar[Stage] = Stage.ADAPT
    numerics: ClassVar[Literal["exact", "identity_at_init", "lossy"]] = "identity_at_init"
    conflicts: ClassVar[frozenset[str]] = frozenset({"lora", "merge"})

    def __post_init__(self) -> None:
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)
        if self.rank < 1:
            raise UserError(f"`passes.lora.rank={self.rank}` must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"`passes.lora.dropout={self.dropout}` must be in [0, 1)")
        if self.init not in ("kaiming", "gaussian"):
            raise UserError(f"`passes.lora.init={self.init}` is not one of kaiming, gaussian")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def badge(self) -> str:
        return f"lora r{self.rank} α{self.alpha:g}"

    def check(self, model: nn.Module) -> None:
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        head = next((n for n, m in linears.items() if m is _output_embeddings(model)), None)
        for name in match(linears, self.targets, head=head, key="passes.lora.targets"):
            rows, columns = linears[name].weight.shape
            self._check_rank(name, rows, columns)

    def _check_rank(self, name: str, rows: int, columns: int) -> None:
        if self.rank > min(rows, columns):
            raise UserError(
                f"`passes.lora.rank={self.rank}` is larger than the {rows}x{columns} weight of "
                f"{name}; choose at most {min(rows, columns)}"
            )

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        linears = edit.sites("linear")
        chosen = match(
            (site.name for site in linears),
            self.targets,
            head=output_head(edit.graph),
            key="passes.lora.targets",
        )
        sites = [site for site in linears if site.name in set(chosen)]
        edit.set_trainable(list(edit.parameters), False)
        for site in sites:
            self._adapt(edit, site)
        return sites

    def _adapt(self, edit: Edit, site: Site) -> None:
        out_features, in_features = site.shape
        self._check_rank(site.name, out_features, in_features)
        a, b = f"{site.name}.lora_A.weight", f"{site.name}.lora_B.weight"
        if a not in edit.parameters:  # a module that is called twice has one adapter
            like = edit.parameters[f"{site.name}.weight"]
            edit.add_parameter(a, self._initial_a(like.new_empty(self.rank, in_features)))
            edit.add_parameter(b, like.new_zeros(out_features, self.rank))
        with edit.after(site.node):
            x = site.input
            if self.dropout > 0:
                x = edit.call(aten.dropout.default, x, self.dropout, edit.read_training())
            low = edit.call(aten.linear.default, x, edit.read(a))
            update = edit.call(aten.linear.default, low, edit.read(b))
            scaled = edit.call(aten.mul.Tensor, update, self.scaling)
            edit.replace_uses(site.node, edit.call(aten.add.Tensor, site.node, scaled))

    def _initial_a(self, a: Tensor) -> Tensor:
        if self.init == "gaussian":
            return nn.init.normal_(a, std=1 / self.rank)
        return nn.init.kaiming_uniform_(a, a=math.sqrt(5))


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


@dataclass(frozen=True)
class Adapted:
    """A linear as LoRA left it: `output = base + scaling * B(A(x))`."""

    site: str
    base: fx.Node
    output: fx.Node
    a: str
    b: str
    scaling: float


def adapted(graph: fx.Graph) -> Iterator[Adapted]:
    """The linears that carry a LoRA update, read back from the graph."""
    for output in graph.nodes:
        if output.target is not aten.add.Tensor or written_by(output) != LoRA.name:
            continue
        base, scaled = output.args
        update, scaling = scaled.args
        low, b = update.args
        yield Adapted(module_of(output)[0], base, output, low.args[1].target, b.target, scaling)
