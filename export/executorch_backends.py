"""The backends of ExecuTorch, by name."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from graphtune.config import did_you_mean
from graphtune.errors import UserError


@dataclass(frozen=True)
class Backend:
    """What runs the operators of a file.

    Attributes:
        name: as users give it.
        runtime: what ExecuTorch's runtime calls it; None for its own portable operators.
        partitioners: what hands operators to it, in order of preference.
    """

    name: str
    runtime: str | None
    partitioners: Callable[[], list[Any]]

    @property
    def runs_here(self) -> bool:
        """Whether the Python runtime that is installed has it."""
        from executorch.runtime import Runtime

        registry = Runtime.get().backend_registry
        return self.runtime is None or registry.is_available(self.runtime)


def _partitioner(module: str, name: str) -> Any:
    return getattr(import_module(f"executorch.backends.{module}"), name)


def _xnnpack() -> list[Any]:
    return [_partitioner("xnnpack.partition.xnnpack_partitioner", "XnnpackPartitioner")()]


def _vulkan() -> list[Any]:
    return [_partitioner("vulkan.partitioner.vulkan_partitioner", "VulkanPartitioner")()]


def _coreml() -> list[Any]:
    partitioner = _partitioner("apple.coreml.partition", "CoreMLPartitioner")
    backend = _partitioner("apple.coreml.compiler", "CoreMLBackend")
    target = import_module("coremltools").target.iOS18  # the first with state, as caches are
    specs = backend.generate_compile_specs(minimum_deployment_target=target)
    return [partitioner(compile_specs=specs)]


def _mps() -> list[Any]:
    return [_partitioner("apple.mps.partition.mps_partitioner", "MPSPartitioner")([])]


def _qnn() -> list[Any]:
    return [_partitioner("qualcomm.partition.qnn_partitioner", "QnnPartitioner")([])]


_ALL = (
    Backend("xnnpack", "XnnpackBackend", _xnnpack),
    Backend("portable", None, list),
    Backend("vulkan", "VulkanBackend", _vulkan),
    Backend("coreml", "CoreMLBackend", _coreml),
    Backend("mps", "MPSBackend", _mps),
    Backend("qnn", "QnnBackend", _qnn),
)
BACKENDS = {backend.name: backend for backend in _ALL}


def partitioners(name: str) -> list[Any]:
    """What lowers to a backend.

    Raises:
        UserError: there is no such backend, or its Python side does not import here.
    """
    if name not in BACKENDS:
        raise UserError(f"backend={name}: there is none of that name{did_you_mean(name, BACKENDS)}")
    level = logging.root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions, and that a backend is deprecated
            return BACKENDS[name].partitioners()
    except (ImportError, OSError, RuntimeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"backend={name}: its Python side does not work here ({reason}); install "
            "what docs.pytorch.org/executorch/stable/backends-overview.html says, or take xnnpack"
        ) from error
    finally:
        logging.root.setLevel(level)
