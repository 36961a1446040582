"""Recurrences of `transformers` models as single operators.

A recurrence steps through the sequence in Python, so that `torch.export` would write out the steps
of the one length that it traces. As an operator it is one node at any length, and runs the code
that the model itself would run, be it plain PyTorch or the kernel of an installed library: the same
bits, forward and backward. The backward pass computes the forward again and keeps nothing else.
"""

from __future__ import annotations

import functools
import inspect
import json
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Those that were made operators here: while they are replaced, their names lead to the operator.
_FUNCTIONS: dict[str, Callable[..., Any]] = {}


def as_operator(function: Callable[..., Any], like: str, *, pair: bool) -> Callable[..., Any]:
    """A function that calls another one as the operator `graphtune::recurrence`.

    Args:
        function: of a module, or a method that makes no use of `self`, which is then called with
            None; takes tensors and JSON values; returns one tensor, or, with `pair`, a tuple of it
            and a final state, of which the operator makes None.
        like: the argument that has the result's shape and dtype.
    """
    path = f"{function.__module__}:{function.__qualname__}"
    signature = inspect.signature(function)
    _FUNCTIONS[path] = function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        bound.pop("kwargs", None)  # what only kernels for packed batches read
        tensors = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in bound.items() if name not in tensors}
        names = list(tensors)
        options = json.dumps({"tensors": names, "constants": constants, "pair": pair})
        result = recurrence(path, list(tensors.values()), options, names.index(like))
        return (result, None) if pair else result

    return call


@torch.library.custom_op("graphtune::recurrence", mutates_args=())
def recurrence(function: str, tensors: list[Tensor], options: str, like: int) -> Tensor:
    """The result of a function, contiguous.

    Args:
        function: where it is, `module:name`.
        tensors: its tensors.
        options: JSON of the tensors' names, of its other arguments, and whether it gives a pair.
        like: the number of the tensor that has the result's shape and dtype.
    """
    return _call(function, tensors, options).contiguous()


@recurrence.register_fake
def _(function: str, tensors: list[Tensor], options: str, like: int) -> Tensor:
    return torch.empty_like(tensors[like], memory_format=torch.contiguous_format)


@torch.library.custom_op("graphtune::recurrence_backward", mutates_args=())
def recurrence_backward(
    function: str, tensors: list[Tensor], options: str, gradient: Tensor
) -> list[Tensor]:
    """The gradients of all tensors."""
    # Below an operator nothing is recorded for autograd, but by a transform of its own.
    floating = [number for number, tensor in enumerate(tensors) if tensor.is_floating_point()]

    def of_floating(*values: Tensor) -> Tensor:
        given = dict(enumerate(tensors)) | dict(zip(floating, values, strict=True))
        return _call(function, list(given.values()), options)

    pull_back = torch.func.vjp(of_floating, *(tensors[number] for number in floating))[1]
    found = dict(zip(floating, pull_back(gradient), strict=True))
    gradients = [found.get(n, torch.zeros_like(tensor)) for n, tensor in enumerate(tensors)]
    return [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients]


@recurrence_backward.register_fake
def _(function: str, tensors: list[Tensor], options: str, gradient: Tensor) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.function, tensors, ctx.options, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[None, list[Tensor], None, None]:
    tensors = list(ctx.saved_tensors)
    return None, recurrence_backward(ctx.function, tensors, ctx.options, gradient), None, None


recurrence.register_autograd(_backward, setup_context=_setup_context)


def _call(function: str, tensors: list[Tensor], options: str) -> Tensor:
    chosen = json.loads(options)
    arguments = dict(zip(chosen["tensors"], tensors, strict=True)) | chosen["constants"]
    result = (_FUNCTIONS.get(function) or pkgutil.resolve_name(function))(**arguments)
    return result[0] if chosen["pair"] else result
