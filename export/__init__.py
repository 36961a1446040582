"""Exports: one file for each target, imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphtune.export.executorch import to_executorch
    from graphtune.export.hf import to_hf
    from graphtune.export.peft import from_peft, to_peft

__all__ = ["from_peft", "to_executorch", "to_hf", "to_peft"]

# ExecuTorch is an optional dependency, and slow to import.
_HOME = {"from_peft": "peft", "to_executorch": "executorch", "to_hf": "hf", "to_peft": "peft"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graphtune.export' has no attribute {name!r}")
    return getattr(import_module(f"graphtune.export.{_HOME[name]}"), name)
