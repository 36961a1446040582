"""A merged model in Hugging Face's layout, which transformers, vLLM and others load."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.serialization import StateDictSplit
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from graphtune.errors import UserError
from graphtune.export.artifact import artifact, logits, probe_ids
from graphtune.models.empty import auto_class
from graphtune.passes.adapters import is_adapter_parameter

MAX_SHARD_SIZE = "5GB"


def to_hf(
    program: nn.Module,
    out_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    verify: bool = True,
    tolerance: float | None = None,
    overwrite: bool = False,
    run: str | None = None,
    fetch: Callable[[str], Tensor] | None = None,
) -> Path:
    """Write a model so that `AutoModelForCausalLM.from_pretrained(out_dir)` gives it back.

    The folder appears whole or not at all: safetensors shards (with an index if there are
    several), `config.json`, `generation_config.json`, the tokenizer's files and `manifest.json`.

    Args:
        program: a Program whose adapters are merged, or any module with a `transformers`
            `.config` and a `state_dict` in Hugging Face's keys.
        out_dir: must be missing or empty.
        tokenizer: saved beside the weights.
        max_shard_size: bytes, or a string as `"5GB"`; a larger tensor has a shard of its own.
        verify: load what was written into transformers' own class and compare the logits. That
            takes the memory of a second model.
        tolerance: largest difference of a logit, where logits reach 10 or less; None: 1e-4 for a
            float32 program.
        overwrite, run: see `graphtune.export.artifact.artifact`.
        fetch: gives a tensor of the state by its name, where `program` is without weights. It is
            called in the order of `plan_files`, and what it gives is let go once the file is
            written. `verify` must be false then.

    Returns:
        The folder.

    Raises:
        UserError: `out_dir` holds something, the program has no config, or adapters that are
            not merged.
        RuntimeError: the logits of what was written differ by more than `tolerance`.
    """
    with artifact(out_dir, "hf", program, overwrite=overwrite, run=run) as made:
        write_hf(
            program, made.path, tokenizer=tokenizer, max_shard_size=max_shard_size, fetch=fetch
        )
        if verify:
            ids = probe_ids(program, tokenizer)
            config: Any = program.config
            loaded: nn.Module = auto_class(config).from_pretrained(made.path)
            loaded.to(next(program.parameters()).device)
            made.check("transformers", logits(loaded, ids), logits(program, ids), tolerance)
    return Path(out_dir)


def write_hf(
    program: nn.Module,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    fetch: Callable[[str], Tensor] | None = None,
) -> None:
    """The files of `to_hf`, into a folder that is there."""
    state = program.state_dict()
    check_mergeable(program, state)
    config = _config_of(program, state)
    config.save_pretrained(folder)
    _generation_config_of(program, config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    plan = plan_files(state, max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: _own((fetch or state.__getitem__)(name)) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors  # before those of the next file come
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def plan_files(
    state: Mapping[str, Tensor], max_shard_size: int | str = MAX_SHARD_SIZE
) -> StateDictSplit:
    """Which tensors of a state, with or without weights, `to_hf` writes into which files."""
    second = set(second_names(state))
    once = {name: tensor for name, tensor in state.items() if name not in second}
    return split_torch_state_dict_into_shards(once, max_shard_size=max_shard_size)


def _own(tensor: Tensor) -> Tensor:
    """A tensor in memory that has nothing else."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def check_mergeable(program: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise UserError if a program is more than the weights of its model's own class."""
    _check_layout(state)
    _check_passes(program)


def _check_passes(program: nn.Module) -> None:
    known = {"quantize", "lora", "dora", "set_adapter", "full", "freeze", "merge"}
    for row in getattr(program, "ledger", ()):
        if row.name not in known and row.parameters > 0:
            raise UserError(
                f"export: the pass {row.name!r} added parameters, which the model's own class in "
                "transformers would leave out"
            )


def _check_layout(state: Mapping[str, Tensor]) -> None:
    # transformers would ignore the extra keys, and load the base model without a word.
    if packed := next(
        (name for name in state if re.search(r"_(nf4|int8|int4|qdata)$", name)), None
    ):
        raise UserError(
            f"export: the program has quantized weights ({packed}), for which Hugging Face has no "
            "layout; apply Merge(dequantize=True), or merge into a base that is not quantized"
        )
    if adapter := next((name for name in state if is_adapter_parameter(name)), None):
        raise UserError(
            f"export: the program has adapters that are not merged ({adapter}); "
            "apply Merge() first, or save them with to_peft"
        )


def _config_of(program: nn.Module, state: Mapping[str, Tensor]) -> PreTrainedConfig:
    """The program's config, made to tell the truth about the tensors that are saved."""
    config = copy.deepcopy(getattr(program, "config", None))
    if not isinstance(config, PreTrainedConfig):
        raise UserError(
            f"to_hf: the {type(program).__name__} has no transformers config, so that no one "
            "could load what it writes; capture a transformers model"
        )
    config.dtype = str(_main_dtype(state)).removeprefix("torch.")
    if hasattr(config, "quantization_config"):  # of the file it was loaded from
        del config.quantization_config
    config.use_cache = True  # load_model turns it off, for training
    info = getattr(program, "info", None)
    config.architectures = [
        _class_name(info.model_class if info else type(program).__name__, config)
    ]
    tied = _embedding_is_tied(state, config.get_text_config().vocab_size)
    if tied is not None:
        config.tie_word_embeddings = tied
        config.get_text_config().tie_word_embeddings = tied
    return config


def _class_name(name: str, config: PreTrainedConfig) -> str:
    """The class in transformers that loads the weights; ours has their names, not its own."""
    known = hasattr(transformers, name)
    return name if known else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]


def _main_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The floating dtype that most weights have."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0]


def second_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that an earlier name has too.

    A module's order puts the input embedding before the output head that is tied to it, and the
    embedding's name is the one that loaders look for.
    """
    first: dict[tuple[int, int], str] = {}
    return [
        name
        for name, tensor in state.items()
        if first.setdefault((_address(tensor), tensor.numel()), name) != name
    ]


def _address(tensor: Tensor) -> int:
    """What tells apart tensors' memory, or, of those without weights, what would be it."""
    return tensor.data_ptr() or tensor.untyped_storage()._cdata


def _embedding_is_tied(state: Mapping[str, Tensor], vocab_size: int) -> bool | None:
    """Whether the output head is the input embedding; None if only one of them is there.

    Merging an adapter into a tied head unties it, and a config that still says "tied" would
    make the loader throw the merged head away.
    """
    tables = {n: t for n, t in state.items() if t.dim() == 2 and t.shape[0] == vocab_size}
    return bool(second_names(tables)) if len(tables) > 1 else None


def _generation_config_of(program: nn.Module, config: PreTrainedConfig) -> GenerationConfig:
    own = getattr(program, "generation_config", None)
    return own if own is not None else GenerationConfig.from_model_config(config)
