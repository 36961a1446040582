"""Ship a program: one file for each target, imported when it is first used.

A target's libraries (`executorch` and its like) are needed only by those who export to it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphtune.export.aoti import to_aoti
    from graphtune.export.executorch import ExecutorchReport, to_executorch
    from graphtune.export.gguf import to_gguf
    from graphtune.export.hf import to_hf
    from graphtune.export.onnx import to_onnx
    from graphtune.export.peft import from_peft, to_peft
    from graphtune.export.pt2 import to_pt2
    from graphtune.export.torchao import to_torchao

__all__ = [
    "ExecutorchReport",
    "from_peft",
    "to_aoti",
    "to_executorch",
    "to_gguf",
    "to_hf",
    "to_onnx",
    "to_peft",
    "to_pt2",
    "to_torchao",
]

TARGETS = ("hf", "peft", "torchao", "gguf", "onnx", "pt2", "aoti", "executorch")
"""Each is written by `to_<name>`, in the module of its name."""

# public name -> the module that defines it
_HOME = {f"to_{target}": f"graphtune.export.{target}" for target in TARGETS} | {
    "ExecutorchReport": "graphtune.export.executorch",
    "from_peft": "graphtune.export.peft",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graphtune.export' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
