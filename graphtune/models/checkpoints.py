"""Checkpoints as tensors by name, read one at a time: safetensors, and what `torch.save` wrote."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from graphtune.distributed import Part
from graphtune.errors import UserError


class Checkpoint(Protocol):
    """Tensors by name.

    Other layouts than Hugging Face's (`meta_llama`, `torchtune`) are checkpoints over checkpoints:
    they have Hugging Face's names, and make each tensor when it is read.
    """

    def names(self) -> Collection[str]: ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in memory of its own, on the CPU; cast to `dtype` if it is floating."""

    def close(self) -> None: ...


class SafetensorsFiles:
    """Safetensors files, open.

    They are read with `pread`: a mapped file would stay in memory as far as it was read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._open = ExitStack()
        self._file_of: dict[str, Any] = {}
        self._path_of: dict[str, Path] = {}
        for path in paths:
            file = self._open.enter_context(safe_open(path, framework="pt", backend="pread"))
            self._file_of |= dict.fromkeys(file.keys(), file)
            self._path_of |= dict.fromkeys(file.keys(), path)

    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def read(self, name: str, dtype: torch.dtype | None = None, part: Part | None = None) -> Tensor:
        """Of the whole tensor, or of a part of it, of which alone the file is read."""
        if part is None:
            tensor = self._file_of[name].get_tensor(name)
        else:  # `pread` would read all of it; a map is gone before it has taken much memory
            with safe_open(self._path_of[name], framework="pt") as file:
                tensor = part.of_file(file.get_slice(name)).clone()
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def close(self) -> None:
        self._open.close()


class TorchFiles:
    """Files that `torch.save` wrote, mapped: the kernel reads what is looked at.

    Attributes:
        tensors: views of the files, by name.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.tensors: dict[str, Tensor] = {}
        for path in paths:
            self.tensors |= read_torch_file(path)

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return own(self.tensors[name], dtype)

    def close(self) -> None:
        self.tensors = {}


def own(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A contiguous copy that shares nothing with a mapped file, cast if it is floating."""
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.to(target, copy=True, memory_format=torch.contiguous_format)


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Tensors by name, as views of the mapped file; no code that the file may hold is run.

    Raises:
        UserError: the file cannot be read, or holds anything but tensors by name.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a damaged pickle raises can be anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.id: {str(path)!r} cannot be read ({reason}); it must be what torch.save wrote "
            "of tensors alone, so if it is damaged, download it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"model.id: {str(path)!r} holds a {type(content).__name__}, not tensors by name"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"model.id: {str(path)!r} has {name!r}, which is a {type(value).__name__}; give "
                "the file that holds only the model's weights"
            )
    return content


def to_half_rotation(weight: Tensor, config: Any, name: str) -> Tensor:
    """Rows of a query or key projection, from pairs of neighbours to pairs half a head apart.

    Args:
        weight: (heads * head_dim, hidden).
        config: says how many heads there are of what size.
        name: Hugging Face's, which tells queries from keys.

    Raises:
        UserError: the weight has not as many rows.
    """
    is_query = "q_proj" in name
    heads = config.num_attention_heads if is_query else config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if len(weight) != heads * head_dim:
        raise UserError(
            f"model.id: {name} has {len(weight)} rows, but {heads} heads of {head_dim} channels "
            f"need {heads * head_dim}; is the config that of another model?"
        )
    return weight.unflatten(0, (heads, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
