"""Merged models in the Hugging Face layout."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig, PreTrainedTokenizerBase

from graphtune.errors import UserError
from graphtune.program import Program


def to_hf(
    program: Program,
    out_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a program's weights so that `AutoModelForCausalLM.from_pretrained` loads them.

    Args:
        program: of a `transformers` model, without adapters (see `Merge`).
        out_dir: must not hold anything; appears whole or not at all.
        tokenizer: saved beside the weights.
        max_shard_size: largest safetensors file; an index ties several together.

    Raises:
        UserError: the folder is in use, the program has adapters, or no `transformers` config.
    """
    folder = Path(out_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export: {folder} exists and is not empty; choose a new folder")
    if program.config is None:
        raise UserError("export.hf: the program has no transformers config; it was no HF model")
    state = program.state_dict()
    if adapters := [name for name in state if ".lora_" in name]:
        raise UserError(f"export.hf: apply Merge first, the program has {adapters[0]}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_torch_state_dict(state, temporary, max_shard_size=max_shard_size)
        config = copy.deepcopy(program.config)
        config.dtype = next(program.parameters()).dtype
        config.use_cache = True  # capture switched it off
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if head in state and embedding in state:
            config.tie_word_embeddings = state[head].data_ptr() == state[embedding].data_ptr()
        config.save_pretrained(temporary)
        GenerationConfig.from_model_config(config).save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder
