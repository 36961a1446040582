"""Ship a program: one file for each target, imported when it is first used.

A target's libraries (`executorch` and its like) are needed only by those who export to it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphtune.export.executorch import ExecutorchReport, to_executorch
    from graphtune.export.hf import to_hf
    from graphtune.export.peft import from_peft, to_peft

__all__ = ["ExecutorchReport", "from_peft", "to_executorch", "to_hf", "to_peft"]

# public name -> the module that defines it
_HOME = {
    "ExecutorchReport": "graphtune.export.executorch",
    "from_peft": "graphtune.export.peft",
    "to_executorch": "graphtune.export.executorch",
    "to_hf": "graphtune.export.hf",
    "to_peft": "graphtune.export.peft",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graphtune.export' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
