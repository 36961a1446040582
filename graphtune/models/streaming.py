"""Read a checkpoint one tensor at a time, under the names and in the form that the model has.

A checkpoint may have names and layouts of its own: a prefix more or less, legacy names, one tensor
for each expert where the model stacks them. transformers knows how to translate them; its mapping
objects are used here for one parameter after the other, so that the model never exists in full.
"""

from __future__ import annotations

import copy
import functools
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from graphtune.distributed import Part
from graphtune.errors import UserError
from graphtune.models.checkpoints import Checkpoint, SafetensorsFiles, TorchFiles
from graphtune.models.dtypes import resolve_dtype
from graphtune.models.empty import auto_class, empty_model
from graphtune.models.gguf import load_gguf_model, open_gguf
from graphtune.models.meta_llama import MetaLlama, has_meta_files
from graphtune.models.sources import (
    as_user_error,
    is_gguf,
    pretrained_options,
    refuse_quantized,
    resolve,
)
from graphtune.models.torchtune import Torchtune, is_torchtune, torchtune_files


def stream_weights(
    id: str | Path,
    model_config: PretrainedConfig,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str | None = None,
    parts: Mapping[str, Part] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of each tensor of a checkpoint, as the model would have loaded it.

    Memory holds the tensor that is yielded and, while one is put together from several (the
    experts of a layer), its parts; nothing is kept once the caller lets go of it. Files that
    `torch.save` wrote are mapped, which takes no memory that the system could not have back. Loaded
    whole and then yielded are only GGUF files of mixtures and of some rare architectures, files of
    other names, and those in the format that `torch.save` had before torch 1.6.

    Args:
        id: as for `load_model`.
        model_config: of the model that the weights are for, such as `program.config`.
        revision: branch, tag or commit on the hub.
        trust_remote_code: let the hub repository's own Python code run.
        dtype: of floating tensors; None or "auto" is the config's `dtype`. Those that the model
            keeps in float32 whatever was asked for are float32.
        parts: by name, the part of a tensor that is enough; where the checkpoint has the tensor
            as it is, in safetensors, only that is read and yielded, without padding.

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
        options: dict[str, Any] = {}
        if not is_gguf(source):
            refuse_quantized(id, model_config)
            options = pretrained_options(source, revision, trust_remote_code)
        model = empty_model(model_config, chosen, trust_remote_code=trust_remote_code)
        checkpoint = _open(source, model, options)
        if checkpoint is None:
            return _unload(_load_whole(source, model.config, options))
        plan, unexpected = _plan(checkpoint, model, parts or {})
    return _stream(id, checkpoint, plan, unexpected, model)


def load_streamed(
    id: str | Path, model: Any, device: torch.device, *, trust_remote_code: bool = False
) -> Any:
    """Give a model its weights, on a device; at no time do they exist twice.

    Args:
        id: as for `load_model`.
        model: as `empty_model` made it, from the config of `id`.
        device: where its parameters go; buffers stay where they are.
        trust_remote_code: let the hub repository's own Python code run.

    Raises:
        UserError: the checkpoint cannot be loaded, lacks a tensor, has one too many, or one of
            another shape.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {}
    for name, tensor in stream_weights(id, model.config, trust_remote_code=trust_remote_code):
        if name not in expected:
            raise UserError(f"model.id: {str(id)!r} has a tensor that the model has not: {name}")
        if tensor.shape != expected[name]:
            raise UserError(
                f"model.id: {name} of {str(id)!r} has shape {tuple(tensor.shape)}, the model "
                f"needs {tuple(expected[name])}"
            )
        state[name] = tensor.to(device)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise UserError(
            f"model.id: the checkpoint of {str(id)!r} lacks {missing[0]!r}"
            + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
        )
    return model


def _load_whole(source: str, config: Any, options: dict[str, Any]) -> torch.nn.Module:
    if is_gguf(source):
        return load_gguf_model(Path(source), config.dtype)
    model: torch.nn.Module = auto_class(config).from_pretrained(
        source, dtype=config.dtype, **options
    )
    return model


def _unload(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a loaded model's tensors, and let go of each."""
    state = dict(model.state_dict())
    del model
    while state:
        yield state.popitem()


def is_foreign(source: str) -> bool:
    """Whether a folder holds weights, but none that transformers can find."""
    folder = Path(source)
    if not folder.is_dir() or any(
        (folder / name).is_file()
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    ):
        return False
    return has_meta_files(folder) or bool(torchtune_files(folder))


def _open(source: str, model: Any, options: dict[str, Any]) -> Checkpoint | None:
    """A checkpoint in the layout that its files have, or None: from_pretrained may know."""
    if is_gguf(source):
        return open_gguf(Path(source), model)
    config = model.config
    if is_foreign(source):
        return _open_foreign(Path(source), config)
    if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None):
        return None  # files with other names
    if files := _files(source, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, options):
        return SafetensorsFiles(files)
    files = _files(source, WEIGHTS_NAME, WEIGHTS_INDEX_NAME, options)
    # Before torch 1.6 files were no archives, and cannot be mapped.
    return TorchFiles(files) if files and all(map(zipfile.is_zipfile, files)) else None


def _open_foreign(folder: Path, config: Any) -> Checkpoint:
    """Meta's or torchtune's files; torchtune also writes Meta's and Hugging Face's names."""
    if has_meta_files(folder):
        return MetaLlama(folder, config)
    files = TorchFiles(torchtune_files(folder))
    if is_torchtune(files.names()):
        return Torchtune(files, config, folder)
    return files


def _files(source: str, name: str, index_name: str, options: dict[str, Any]) -> list[Path]:
    """Paths of a checkpoint of one kind, fetched from the hub where they are there."""
    folder = Path(source)
    if not folder.is_dir():
        where = {key: options[key] for key in ("revision", "local_files_only")}
        folder = Path(snapshot_download(source, allow_patterns=[name, index_name], **where))
    if (folder / name).is_file():
        return [folder / name]
    if not (folder / index_name).is_file():
        return []
    index = json.loads((folder / index_name).read_text())
    names = sorted(set(index["weight_map"].values()))
    if not Path(source).is_dir():
        folder = Path(snapshot_download(source, allow_patterns=names, **where))
    return [folder / name for name in names]


def _plan(
    checkpoint: Checkpoint, model: Any, parts: Mapping[str, Part]
) -> tuple[dict[str, Any], list[str]]:
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
    for source in sorted(checkpoint.names(), key=dot_natural_key):
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
        if name in parts and pattern is None and isinstance(checkpoint, SafetensorsFiles):
            read = functools.partial(read, part=parts[name])
        plan[name].add_tensor(name, source, pattern or source, read)
    return plan, _not_ignored(unexpected, model)


def _not_ignored(unexpected: dict[str, str], model: Any) -> list[str]:
    """Of tensors that the model lacks, those that it does not ask to be ignored."""
    report = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unexpected.values()))
    model._adjust_missing_and_unexpected_keys(report)
    return [source for source, name in unexpected.items() if name in report.unexpected_keys]


def _stream(
    id: str | Path,
    checkpoint: Checkpoint,
    plan: dict[str, Any],
    unexpected: list[str],
    model: Any,
) -> Iterator[tuple[str, Tensor]]:
    with as_user_error(id), closing(checkpoint):
        for first_name, transform in plan.items():
            values = transform.convert(first_name, model=model, config=model.config)
            while values:
                name, value = values.popitem()
                one = [value[0] if isinstance(value, list) else value]
                del value
                yield name, one.pop()  # no reference to it stays here
        for source in unexpected:
            yield source, checkpoint.read(source)
