"""QLoRA: LoRA over a base whose weights are quantized (Dettmers et al., arXiv:2305.14314)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from torch import nn

from graphtune.passes.base import Pass
from graphtune.passes.lora import LoRA
from graphtune.passes.quantize import Quantize
from graphtune.rules import Target


@dataclass(frozen=True)
class QLoRA(LoRA):
    """`Quantize` and `LoRA` under one name; either can be named by itself for more control.

    Attributes:
        quantize: format of the base weights, see `Quantize`.
        quantize_targets: which weights, see `Quantize`; by default all linears and experts but
            the output head and routers, whether or not they are adapted.

    The others are those of `LoRA`.
    """

    quantize: Literal["nf4", "int8", "int4"] = "nf4"
    quantize_targets: tuple[Target, ...] = ("all-linear",)

    name: ClassVar[str] = "qlora"

    def parts(self) -> Sequence[Pass]:
        lora = {field.name: getattr(self, field.name) for field in fields(LoRA)}
        return Quantize(format=self.quantize, targets=self.quantize_targets), LoRA(**lora)

    def check(self, model: nn.Module) -> None:
        for part in self.parts():
            part.check(model)
