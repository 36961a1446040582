"""Passes: one file for each technique. `registry` is what configs name."""

from graphtune.passes.activation_checkpoint import ActivationCheckpoint
from graphtune.passes.adapters import SetAdapter
from graphtune.passes.base import Pass, Stage
from graphtune.passes.convert import Convert
from graphtune.passes.dora import DoRA
from graphtune.passes.full import Freeze, Full
from graphtune.passes.lora import LoRA
from graphtune.passes.merge import Merge, Unmerge
from graphtune.passes.neftune import NEFTune
from graphtune.passes.qat import QAT
from graphtune.passes.qlora import QLoRA
from graphtune.passes.quantize import Quantize

_ALL: tuple[type[Pass], ...] = (
    Quantize,
    LoRA,
    DoRA,
    QLoRA,
    SetAdapter,
    Full,
    Freeze,
    NEFTune,
    QAT,
    Merge,
    Convert,
    ActivationCheckpoint,
)
registry: dict[str, type[Pass]] = {one.name: one for one in _ALL}

__all__ = [
    "QAT",
    "ActivationCheckpoint",
    "Convert",
    "DoRA",
    "Freeze",
    "Full",
    "LoRA",
    "Merge",
    "NEFTune",
    "Pass",
    "QLoRA",
    "Quantize",
    "SetAdapter",
    "Stage",
    "Unmerge",
    "registry",
]
