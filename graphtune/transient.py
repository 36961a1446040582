"""Tensors that the backward pass computes again, where no compiler reads the graph's tags.

Dequantized and gathered weights are larger than what they are computed from. An operator that
makes such tensors says so with `remember`; what autograd saves of them is then only the recipe.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

Compute = Callable[..., Sequence[Tensor]]


class _Call:
    """One call of an operator, which can be made again."""

    def __init__(self, compute: Compute, args: Sequence[Any], unit: str) -> None:
        self.compute, self.args, self.unit = compute, args, unit

    @torch.no_grad()
    def again(self, given: _Given) -> Sequence[Tensor]:
        kept = given.kept(self.unit)
        if self in kept:
            return kept[self]
        results = self.compute(*(given.unpack(arg) for arg in self.args))
        if self.unit:
            kept[self] = results
        return results


class _Given:
    """What operators made within one `recompute_in_backward`."""

    def __init__(self) -> None:
        self._by_storage: dict[int, tuple[weakref.ref[Tensor], _Call, int]] = {}
        self._unit = ""
        self._kept: dict[_Call, Sequence[Tensor]] = {}

    def add(self, results: Sequence[Tensor], call: _Call) -> None:
        for index, result in enumerate(results):
            # While a result lives, no other tensor has its storage.
            storage = result.untyped_storage()._cdata
            self._by_storage[storage] = (weakref.ref(result), call, index)

    def kept(self, unit: str) -> dict[_Call, Sequence[Tensor]]:
        """What was computed again of the unit that the backward pass is in, and no other."""
        if unit and unit != self._unit:
            self._unit, self._kept = unit, {}
        return self._kept

    def pack(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self.pack(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        result, call, index = self._by_storage.get(
            value.untyped_storage()._cdata, (None, None, None)
        )
        if result is None or result() is None:
            return value
        return _Packed(call, index, value.shape, value.stride(), value.storage_offset())

    def unpack(self, packed: Any) -> Any:
        if isinstance(packed, list):
            return [self.unpack(item) for item in packed]
        if not isinstance(packed, _Packed):
            return packed
        return packed.call.again(self)[packed.index].as_strided(*packed.view)


class _Packed:
    """Stands for a tensor: the call that makes it, which result it is of, and a view of that."""

    def __init__(self, call: Any, index: Any, *view: Any) -> None:
        self.call, self.index, self.view = call, index, view


_given: ContextVar[_Given | None] = ContextVar("given", default=None)


def remember(results: Sequence[Tensor], compute: Compute, args: Sequence[Any], unit: str) -> None:
    """Say that tensors can be computed again, as `compute(*args)`.

    Args:
        results: what it returned.
        unit: what is computed again of one unit, such as a layer, is kept until the backward pass
            needs something of another one; "" keeps nothing.
    """
    if (given := _given.get()) is not None:
        given.add(results, _Call(compute, given.pack(list(args)), unit))


@contextmanager
def recompute_in_backward() -> Iterator[None]:
    """Within it, eager autograd keeps no such tensor, but computes it again.

    A compiled step needs no such thing: there the operators' nodes are tagged in the graph.
    """
    given = _Given()
    token = _given.set(given)
    try:
        with torch.autograd.graph.saved_tensors_hooks(given.pack, given.unpack):
            yield
    finally:
        _given.reset(token)
