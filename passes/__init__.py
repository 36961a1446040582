"""Passes: one file for each technique. `registry` is what configs name."""

from graphtune.passes.base import Pass, Stage
from graphtune.passes.lora import LoRA
from graphtune.passes.merge import Merge

registry: dict[str, type[Pass]] = {one.name: one for one in (LoRA, Merge)}

__all__ = ["LoRA", "Merge", "Pass", "Stage", "registry"]
