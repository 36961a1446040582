"""Nested Python values as JSON beside named tensors, bit for bit, and back; nothing is pickled.

What JSON has not is a mapping with one key that starts with `$`. A tensor is `{"$tensor": {...}}`
with the name under which it is kept; a tensor subclass, such as torchao's quantized optimizer
states, is taken apart by its `__tensor_flatten__`, down to plain tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphtune.errors import UserError

Change = Callable[[str, Tensor], Tensor]  # of a tensor with a path


def _as_it_is(path: str, value: Tensor) -> Tensor:
    return value


def flatten(value: Any, tensors: dict[str, Tensor], path: str, change: Change = _as_it_is) -> Any:
    """`value` as JSON.

    Args:
        value: tensors, numbers, strings, None, dtypes, and dicts, lists and tuples of them.
        tensors: every tensor within is put here as a copy on the CPU, contiguous, under its
            path: later changes of `value` do not reach it.
        path: of `value`; what lies within appends `/key`.
        change: what to keep in a tensor's place, on the same device.

    Raises:
        UserError: a value of another type, which nothing but code could make again.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        return _flatten_tensor(value, tensors, path, change)
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        items = [flatten(item, tensors, f"{path}/{i}", change) for i, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return {"$size" if isinstance(value, torch.Size) else "$tuple": items}
    if isinstance(value, Mapping):
        pairs = [
            (key, flatten(item, tensors, f"{path}/{key}", change)) for key, item in value.items()
        ]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$pairs": [[flatten(key, tensors, path), item] for key, item in pairs]}
    raise UserError(
        f"checkpoint: {path} is a {type(value).__name__}, which cannot be written; "
        "state must be of tensors, numbers, strings, lists and dicts"
    )


def unflatten(
    written: Any,
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> Any:
    """What `flatten` was given.

    Args:
        written: what it returned.
        tensors: what it collected, or parts of these.
        device: where tensors go that were not on the CPU. All of them are copies.

    Raises:
        UserError: a tensor class that no loaded module defines.
    """
    if isinstance(written, list):
        return [unflatten(item, tensors, device) for item in written]
    if not isinstance(written, dict):
        return written
    key: str = next(iter(written), "")
    if not key.startswith("$"):
        return {name: unflatten(item, tensors, device) for name, item in written.items()}
    value = written[key]
    if key == "$float":
        return float(value)
    if key == "$dtype":
        return getattr(torch, value)
    if key == "$tensor":
        return _unflatten_tensor(value, tensors, device)
    if key == "$subclass":
        inner = {name: unflatten(one, tensors, device) for name, one in value["inner"].items()}
        context = unflatten(value["context"], tensors, device)
        return _subclass(value["class"]).__tensor_unflatten__(
            inner, context, torch.Size(value["size"]), tuple(value["stride"])
        )
    items = unflatten(value, tensors, device)
    return {"$tuple": tuple, "$size": torch.Size, "$pairs": dict}[key](items)


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Overwrite a tensor with another of the same class and shape, bit for bit, in place.

    The `copy_` of a quantized tensor may quantize anew, so that what it is made of is copied.
    """
    if is_traceable_wrapper_subclass(target):
        for name in target.__tensor_flatten__()[0]:
            copy_into(getattr(target, name), getattr(source, name))
    else:
        target.copy_(source)


def _flatten_tensor(value: Tensor, tensors: dict[str, Tensor], path: str, change: Change) -> Any:
    if is_traceable_wrapper_subclass(value):
        names, context = value.__tensor_flatten__()
        return {
            "$subclass": {
                "class": f"{type(value).__module__}.{type(value).__qualname__}",
                "inner": {
                    name: flatten(getattr(value, name), tensors, f"{path}/{name}", change)
                    for name in names
                },
                "context": flatten(context, tensors, f"{path}/context"),
                "size": list(value.shape),
                "stride": list(value.stride()),
            }
        }
    if path in tensors:
        raise UserError(f"checkpoint: two tensors have the path {path!r}; rename one")
    value = change(path, value)
    copy = torch.empty_like(value, device="cpu", requires_grad=False).copy_(value.detach())
    written: dict[str, Any] = {"name": path, "device": value.device.type}
    if not copy.is_contiguous():
        written["stride"] = list(copy.stride())
    tensors[path] = copy.contiguous()
    return {"$tensor": written}


def _unflatten_tensor(
    written: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> Tensor:
    # A copy even on the CPU: tensors of a file lie in memory at odd addresses, for which
    # vectorized kernels may round otherwise. Strides are kept for the same reason.
    value = tensors[written["name"]]
    device = torch.device("cpu") if written["device"] == "cpu" else device
    stride = written.get("stride")
    if stride is not None and _is_dense(value.shape, stride):
        made = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=device)
    else:
        made = torch.empty(value.shape, dtype=value.dtype, device=device)
    return made.copy_(value)


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the strides of a tensor leave no gaps between the elements of a part of it."""
    spanned = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return spanned == math.prod(shape)


def _subclass(name: str) -> Any:
    """A tensor class by name, among those that exist: a file must not make us import code."""
    for kind in _descendants(Tensor):
        if f"{kind.__module__}.{kind.__qualname__}" == name:
            return kind
    raise UserError(f"checkpoint: it holds a {name}, which nothing that is imported here defines")


def _descendants(kind: type) -> Iterator[type]:
    children: list[type] = kind.__subclasses__()
    for child in children:
        yield child
        yield from _descendants(child)
