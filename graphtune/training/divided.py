"""Which tensors of a run's state ranks have parts of, and which rank writes what of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graphtune.distributed import Part, is_main, is_spread
from graphtune.errors import UserError
from graphtune.program import Program
from graphtune.training.stored import ranges_of, rank_file, shape_of


class Divided:
    """The divided tensors of a program, and what a state keeps in their shape, by its path.

    A path, such as `optimizers/0/state/lm_head.weight/exp_avg`, has the tensor's name in it.
    """

    def __init__(self, program: Program) -> None:
        self._distribution = getattr(program, "distribution", None)
        self._parts: Mapping[str, tuple[Part, ...]] = {}
        self._tensors: dict[str, Tensor] = {}
        if self._distribution is not None and self._distribution.parts:
            self._parts = self._distribution.parts
            self._tensors = program.all_parameters() | dict(program.named_buffers())
        self._layouts: dict[str, dict[str, Any]] = {}
        self._rank, self._ranks = (
            (dist.get_rank(), dist.get_world_size()) if is_spread() else (0, 1)
        )

    def __bool__(self) -> bool:
        return bool(self._parts)

    @property
    def file(self) -> str:
        """What this rank writes."""
        return rank_file(self._rank, self._ranks)

    def whole_shape(self, name: str, tensor: Tensor) -> torch.Size:
        """The shape of the whole of a parameter or buffer."""
        if self._distribution is None:
            return tensor.shape
        return self._distribution.whole_shape(name, tensor.shape)

    def shard(self, path: str, value: Tensor, layouts: dict[str, Any]) -> Tensor:
        """What this rank writes of a tensor of its state, without padding; empty if nothing.

        Args:
            layouts: if the tensor is divided, what `state.json` says of it is put here.

        Raises:
            UserError: it belongs to a divided tensor, and has another shape.
        """
        name = self._name(path)
        if name is not None and value.shape == self._tensors[name].shape:
            layouts[path] = self._layout(name)
            for part in self._parts[name]:
                value = value.narrow(part.dim, 0, part.stop - part.start)
            mine = self._writes(layouts[path])
            return value.contiguous() if mine else value.new_empty(0)
        if name is not None and value.dim() > 0:
            raise UserError(
                f"checkpoint: {path} has the shape {tuple(value.shape)}, its parameter "
                f"{tuple(self._tensors[name].shape)}, so that it cannot be put together from the "
                "ranks'; take an optimizer that keeps elementwise state, such as AdamW"
            )
        return value if is_main() else value.new_empty(0)

    def own(self, tensors: Mapping[str, Tensor], layouts: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those of a state's tensors that this rank writes."""
        return {
            path: tensor
            for path, tensor in tensors.items()
            if (self._writes(layouts[path]) if path in layouts else is_main())
        }

    def others(self, layouts: Mapping[str, Any]) -> tuple[str, ...]:
        """The files that other ranks write."""
        files = {part["file"] for layout in layouts.values() for part in layout["parts"]}
        return tuple(sorted(files - {self.file}))

    def wanted(self, path: str, shape: Sequence[int]) -> Sequence[Part]:
        """What this rank has of a tensor of a checkpoint, whose whole has this shape."""
        name = self._name(path)
        if name is None or self.whole_shape(name, self._tensors[name]) != torch.Size(shape):
            return ()
        return self._parts[name]

    def _name(self, path: str) -> str | None:
        """The divided tensor that a path leads to, or whose optimizer state it leads to."""
        return next((one for one in path.split("/") if self._parts.get(one)), None)

    def _writes(self, layout: Mapping[str, Any]) -> bool:
        return any(part["file"] == self.file for part in layout["parts"])

    def _layout(self, name: str) -> dict[str, Any]:
        if name not in self._layouts:
            shape = list(self.whole_shape(name, self._tensors[name]))
            found = [(rank, ranges_of(parts, shape)) for rank, parts in self._shards(name)]
            self._layouts[name] = {
                "shape": shape,
                "parts": [
                    {"file": rank_file(rank, self._ranks), "ranges": ranges}
                    for rank, ranges in found
                    if all(shape_of(ranges))
                ],
            }
        return self._layouts[name]

    def _shards(self, name: str) -> Iterator[tuple[int, list[Part]]]:
        """Each shard of a tensor, with the first of the ranks that have it."""
        assert self._distribution is not None
        mesh, parts = self._distribution.mesh, self._parts[name]
        for places in itertools.product(*(range(part.ranks) for part in parts)):
            at = {part.axis: place for part, place in zip(parts, places, strict=True)}
            rank = mesh.mesh[tuple(at.get(axis, 0) for axis in mesh.mesh_dim_names or ())]
            yield (
                int(rank),
                [
                    dataclasses.replace(part, rank=place)
                    for part, place in zip(parts, places, strict=True)
                ],
            )
