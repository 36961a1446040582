"""graphtune: capture a plain transformer once, rewrite it with passes, train it compiled, ship it.

    import graphtune as gt
    from graphtune.passes import LoRA

    model = gt.load_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    program = gt.capture(model).apply(LoRA(rank=8, alpha=16, targets=["all-linear"]))

The names below are imported when they are first used, so that `graphtune --help` does not
wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import graphtune.export as export  # `from graphtune import` is a cycle to a type checker
    from graphtune import errors, passes
    from graphtune.capture import capture
    from graphtune.engine import compile_step
    from graphtune.errors import UserError
    from graphtune.models import load_model
    from graphtune.program import Program
    from graphtune.weights import load_weights

__all__ = [
    "Program",
    "UserError",
    "capture",
    "compile_step",
    "errors",
    "export",
    "load_model",
    "load_weights",
    "passes",
]

# public name -> the module that defines it; a name that is itself a submodule maps to nothing
_HOME = {
    "Program": "graphtune.program",
    "UserError": "graphtune.errors",
    "capture": "graphtune.capture",
    "compile_step": "graphtune.engine",
    "load_model": "graphtune.models",
    "load_weights": "graphtune.weights",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'graphtune' has no attribute {name!r}")
    if name not in _HOME:
        return import_module(f"graphtune.{name}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `graphtune.capture` the function, whichever import comes first.

    When the import system has loaded a submodule it binds it as an attribute of its package,
    which would put the module `graphtune/capture.py` in the place of its public function.
    Setting a module's class is Python's documented way to customise its attributes.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
