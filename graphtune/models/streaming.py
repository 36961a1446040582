"""Read a checkpoint one tensor at a time, under the names and in the form that the model has.

A checkpoint may have names and layouts of its own: a prefix more or less, legacy names, one tensor
for each expert where the model stacks them. transformers knows how to translate them; its mapping
objects are used here for one parameter after the other, so that the model never exists in full.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from graphtune.models.gguf import load_gguf_model
from graphtune.models.loading import (
    as_user_error,
    empty_model,
    is_gguf,
    pretrained_options,
    refuse_quantized,
    resolve,
    resolve_dtype,
)


def stream_weights(
    id: str | Path,
    model_config: PretrainedConfig,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of each tensor of a checkpoint, as the model would have loaded it.

    Memory holds the tensor that is yielded and, while one is put together from several (the
    experts of a layer), its parts; nothing is kept or mapped once the caller lets go of it. Two
    kinds of checkpoints are loaded whole and then yielded: GGUF files, and those without a
    safetensors file under the usual name (PyTorch's `.bin`).

    Args:
        id: as for `load_model`.
        model_config: of the model that the weights are for, such as `program.config`.
        revision: branch, tag or commit on the hub.
        trust_remote_code: let the hub repository's own Python code run.
        dtype: of floating tensors; None or "auto" is the config's `dtype`. Those that the model
            keeps in float32 whatever was asked for are float32.

    Yields:
        Names as in the module's `state_dict`, and tensors on the CPU, in no order to rely on.
        Names that a checkpoint lacks (a tied weight) are left out; those that the model lacks
        come last, under the checkpoint's name, but for the ones that transformers ignores too.

    Raises:
        UserError: no such model, or a checkpoint that cannot be loaded; most when called, damage
            further on in a file when it is reached.
    """
    chosen = resolve_dtype("auto" if dtype is None else dtype, "meta")
    source = resolve(id)
    with as_user_error(id):
        if is_gguf(source):
            gguf_dtype = model_config.dtype or chosen if chosen == "auto" else chosen
            return _unload(load_gguf_model(Path(source), gguf_dtype))
        refuse_quantized(id, model_config)
        options = pretrained_options(source, revision, trust_remote_code)
        model = empty_model(model_config, chosen, trust_remote_code=trust_remote_code)
        files = _safetensors_files(source, model_config, options)
        if files is None:
            chosen = model.config.dtype
            return _unload(AutoModelForCausalLM.from_pretrained(source, dtype=chosen, **options))
        checkpoint = _Checkpoint(files)
        plan, unexpected = _plan(checkpoint, model)
    return _stream(id, checkpoint, plan, unexpected, model)


def _unload(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a loaded model's tensors, and let go of each."""
    state = dict(model.state_dict())
    del model
    while state:
        yield state.popitem()


def _safetensors_files(
    source: str, config: PretrainedConfig, options: dict[str, Any]
) -> list[Path] | None:
    """Paths of the checkpoint's safetensors files, fetched from the hub where they are there."""
    if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None):
        return None  # files with other names: from_pretrained knows
    folder = Path(source)
    if not folder.is_dir():
        where = {key: options[key] for key in ("revision", "local_files_only")}
        wanted = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
        folder = Path(snapshot_download(source, allow_patterns=wanted, **where))
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return None
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())
    names = sorted(set(index["weight_map"].values()))
    if not Path(source).is_dir():
        folder = Path(snapshot_download(source, allow_patterns=names, **where))
    return [folder / name for name in names]


class _Checkpoint:
    """Safetensors files, open.

    They are read with `pread`: a mapped file would stay in memory as far as it was read.
    """

    def __init__(self, files: list[Path]) -> None:
        self.open = ExitStack()
        self.file_of: dict[str, Any] = {}
        for path in files:
            file = self.open.enter_context(safe_open(path, framework="pt", backend="pread"))
            self.file_of |= dict.fromkeys(file.keys(), file)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor by the checkpoint's name; cast to `dtype` if it is floating."""
        tensor = self.file_of[name].get_tensor(name)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _plan(checkpoint: _Checkpoint, model: Any) -> tuple[dict[str, Any], list[str]]:
    """What makes each of the model's tensors, by name, and what the model has no use for.

    A plan's values are a WeightRenaming or a WeightConverter of transformers with functions that
    read its sources, which it calls when it is told to convert. This follows transformers'
    `convert_and_load_state_dict_in_model`, which cannot be stopped between two tensors.
    """
    expected = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    converter_of = {pattern: one for one in converters for pattern in one.source_patterns}
    plan: dict[str, Any] = {}
    unexpected: dict[str, str] = {}
    # The order counts: parts of a converter are stacked in it, and some renamings rely on it.
    for source in sorted(checkpoint.file_of, key=dot_natural_key):
        prefix = model.base_model_prefix
        name, pattern = rename_source_key(source, renamings, converters, prefix, expected)
        if name not in expected and source in expected:
            name, pattern = rename_source_key(source, [], [], prefix, expected)
        if name not in expected:
            unexpected[source] = name
            continue
        if name not in plan:
            converter = converter_of[pattern] if pattern else WeightRenaming(source, name)
            plan[name] = copy.deepcopy(converter)
        read = functools.partial(checkpoint.read, source, expected[name].dtype)
        plan[name].add_tensor(name, source, pattern or source, read)
    return plan, _not_ignored(unexpected, model)


def _not_ignored(unexpected: dict[str, str], model: Any) -> list[str]:
    """Of tensors that the model lacks, those that it does not ask to be ignored."""
    report = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unexpected.values()))
    model._adjust_missing_and_unexpected_keys(report)
    return [source for source, name in unexpected.items() if name in report.unexpected_keys]


def _stream(
    id: str | Path,
    checkpoint: _Checkpoint,
    plan: dict[str, Any],
    unexpected: list[str],
    model: Any,
) -> Iterator[tuple[str, Tensor]]:
    with as_user_error(id), checkpoint.open:
        for first_name, transform in plan.items():
            values = transform.convert(first_name, model=model, config=model.config)
            while values:
                name, value = values.popitem()
                one = [value[0] if isinstance(value, list) else value]
                del value
                yield name, one.pop()  # no reference to it stays here
        for source in unexpected:
            yield source, checkpoint.read(source)
