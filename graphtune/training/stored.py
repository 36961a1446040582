"""The tensors of a checkpoint as they lie on disk: read slice by slice, whoever wrote them.

A run of one process writes one file. Of several ranks each writes its own: rank 0 what is the same
on all, and of a tensor that is divided each shard the first rank that has it. `state.json` then has

    "divided": {path: {"shape": [...], "parts": [{"file": ..., "ranges": [...]}, ...]}}

with the shape of the whole, and of each part, for every dimension, the `[start, length]` of the
stretches of the whole that the tensor of this path in that file has, one after another: one, but
several of a fused projection, whose pieces are divided by themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from graphtune.distributed import Part

TENSORS = "state.safetensors"

Ranges = Sequence[Sequence[Sequence[int]]]  # for each dimension, [start, length] of stretches
Wanted = Callable[[str, Sequence[int]], Sequence[Part]]  # of a path and the shape of its whole


def rank_file(rank: int, ranks: int) -> str:
    """The name of the file that a rank writes."""
    return TENSORS if ranks == 1 else f"state-rank-{rank}.safetensors"


def ranges_of(parts: Sequence[Part], shape: Sequence[int]) -> list[list[list[int]]]:
    """What a rank has of a tensor, without padding.

    Args:
        parts: as in `Distribution.parts`; none for the whole.
        shape: of the whole.
    """
    ranges = [[[0, size]] for size in shape]
    for part in parts:
        ranges[part.dim] = [[part.start, part.stop - part.start]]
        if part.pieces:
            starts = itertools.accumulate(part.pieces[:-1], initial=0)
            lengths = [size // part.ranks for size in part.pieces]
            ranges[part.dim] = [
                [start + part.rank * length, length]
                for start, length in zip(starts, lengths, strict=True)
            ]
    return ranges


def shape_of(ranges: Ranges) -> list[int]:
    """The shape of the tensor that has these ranges of another."""
    return [sum(length for _, length in stretches) for stretches in ranges]


class StoredTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by path, on the CPU; what is not asked for is not read."""

    def __init__(
        self, folder: Path, description: Mapping[str, Any], wanted: Wanted = lambda path, shape: ()
    ) -> None:
        """Open the files.

        Args:
            folder: the checkpoint.
            description: what its `state.json` says.
            wanted: the part of each tensor that is to be read, which is then padded as
                `Distribution.own` has it; by default the whole.

        Raises:
            OSError, SafetensorError: a file is missing or damaged.
        """
        self._divided = description.get("divided", {})
        self._wanted = wanted
        main = rank_file(0, 2 if "divided" in description else 1)
        names = {part["file"] for one in self._divided.values() for part in one["parts"]}
        self._files = {name: safe_open(folder / name, "pt") for name in sorted({main, *names})}
        self._main = self._files[main]
        self._paths = dict.fromkeys([*self._main.keys(), *self._divided])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, path: str) -> Tensor:
        if path not in self._paths:
            raise KeyError(path)
        shape, stored = self._stored(path)
        parts = self._wanted(path, shape)
        if path not in self._divided and not parts:
            return self._main.get_tensor(path)
        value = self._assembled(stored, ranges_of(parts, shape))
        for part in parts:
            value = part.padded(value)
        return value

    def _stored(self, path: str) -> tuple[list[int], list[tuple[Any, Ranges]]]:
        """The shape of the whole, and what of it lies where."""
        if path not in self._divided:
            file = self._main.get_slice(path)
            return file.get_shape(), [(file, ranges_of((), file.get_shape()))]
        one = self._divided[path]
        files = ((self._files[part["file"]], part["ranges"]) for part in one["parts"])
        return one["shape"], [(file.get_slice(path), ranges) for file, ranges in files]

    def _assembled(self, stored: Sequence[tuple[Any, Ranges]], wanted: Ranges) -> Tensor:
        file, _ = stored[0]
        value = torch.empty(shape_of(wanted), dtype=file[0:0].dtype)
        for file, ranges in stored:
            for there, here in itertools.product(_blocks(ranges), _blocks(wanted)):
                found = [_overlap(*one) for one in zip(there, here, strict=True)]
                if all(source.stop > source.start for source, _ in found):
                    value[tuple(to for _, to in found)] = file[tuple(at for at, _ in found)]
        return value


def _blocks(ranges: Ranges) -> list[tuple[tuple[int, int, int], ...]]:
    """The blocks that a part is made of: of each dimension, where one starts in the whole, its
    length, and where it starts in the part."""
    located = []
    for stretches in ranges:
        places = itertools.accumulate((length for _, length in stretches), initial=0)
        located.append([(start, length, at) for (start, length), at in zip(stretches, places)])  # noqa: B905
    return list(itertools.product(*located))


def _overlap(there: tuple[int, int, int], here: tuple[int, int, int]) -> tuple[slice, slice]:
    """Where in either of two parts, in one dimension, lies what both their blocks have."""
    start = max(there[0], here[0])
    stop = max(start, min(there[0] + there[1], here[0] + here[1]))
    source, target = (
        slice(start - one[0] + one[2], stop - one[0] + one[2]) for one in (there, here)
    )
    return source, target
