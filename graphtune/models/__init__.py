"""Load plain transformers: the model, its tokenizer or processor, its config, all by one id."""

from graphtune.models.loading import (
    load_config,
    load_model,
    load_processor,
    load_tokenizer,
    resolve_dtype,
)

__all__ = ["load_config", "load_model", "load_processor", "load_tokenizer", "resolve_dtype"]
