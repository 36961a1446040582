"""The optional packages of targets, and what to say where one is missing."""

from __future__ import annotations

from importlib import import_module

from graphtune.errors import UserError

# target -> modules that must import, and the extra of graphtune that brings them
_PACKAGES = {
    "executorch": (("executorch.exir", "executorch.kernels.quantized"), "executorch"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "torchao": (("torchao.quantization",), "executorch"),
}


def require(target: str) -> None:
    """Raise UserError, with the command that helps, if a package of a target cannot be imported."""
    modules, extra = _PACKAGES.get(target, ((), ""))
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(
                f"exporting to {target} needs {module.partition('.')[0]} ({error}): "
                f"pip install 'graphtune[{extra}]'"
            ) from error
