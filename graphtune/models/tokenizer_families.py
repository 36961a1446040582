"""What the raw tokenizer files of model families do not say about themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# How text is cut before the merges, as the families' own loaders write it.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA4 = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """What a raw file does not say about itself.

    bos, eos, pad: special tokens, by their text.
    template: name of the chat template, one of `graphtune.data.templates.TEMPLATES`.
    adds_bos: whether plain text begins with `bos`.
    pattern: how text is cut before the merges; empty for sentencepiece models.
    composed: whether text is brought to Unicode's NFC first.
    tokens: special tokens; those that the file lacks get the ids after its last, in this order.
    visible: as `tokens`, after them, but not special: `decode` never leaves them out.
    strips_right: whether `tokens` swallow the whitespace after them.
    """

    bos: str | None
    eos: str
    pad: str
    template: str
    adds_bos: bool = True
    pattern: str = ""
    composed: bool = False
    tokens: Sequence[str] = ()
    visible: Sequence[str] = ()
    strips_right: bool = False


def _named(names: str) -> list[str]:
    return [f"<|{name}|>" for name in names.split()]


def _reserved(first: int, count: int, name: str = "") -> list[str]:
    return [f"<|{name}reserved_special_token_{first + i}|>" for i in range(count)]


# Names and order: llama_models/llama{3,4}/tokenizer.py, which ship beside the files.
_LLAMA3_TOKENS = [
    *_named("begin_of_text end_of_text"),
    *_reserved(0, 2),
    *_named("finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id"),
    *_named("python_tag image"),
    *_reserved(2, 244),
]
_LLAMA4_TOKENS = [
    *_named("begin_of_text end_of_text fim_prefix fim_middle fim_suffix"),
    *_named("header_start header_end eom eot step"),
    *_reserved(0, 6, "text_post_train_"),
    *_named("python_start python_end finetune_right_pad"),
    *_reserved(8, 61, "text_post_train_"),
    *_named("image_start image_end"),
    *_reserved(0, 2, "vision_"),
    *_named("tile_x_separator tile_y_separator"),
    *_reserved(2, 4, "vision_"),
    *_named("image vision_reserved_special_token_6 patch"),
    *_reserved(7, 1041, "vision_"),
    *_reserved(0, 8, "reasoning_"),
    *_named("reasoning_thinking_start reasoning_thinking_end"),
    *_reserved(0, 904),
]
_QWEN_TOKENS = _named(
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
    "quad_end vision_start vision_end vision_pad image_pad video_pad"
)
_QWEN_VISIBLE = [
    *("<tool_call>", "</tool_call>"),
    *_named("fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
]
_PHI3_TOKENS = _named(
    "endoftext assistant placeholder1 placeholder2 placeholder3 placeholder4 system end "
    "placeholder5 placeholder6 user"
)

FAMILIES = {
    "llama2": Family("<s>", "</s>", "<unk>", "llama2"),
    "mistral": Family("<s>", "</s>", "<unk>", "mistral"),
    "gemma": Family(
        *("<bos>", "<eos>", "<pad>", "gemma"),
        tokens=["<start_of_turn>", "<end_of_turn>"],
    ),
    "phi3": Family(
        *("<s>", "<|endoftext|>", "<|endoftext|>", "phi3"),
        adds_bos=False,
        tokens=_PHI3_TOKENS,
        strips_right=True,
    ),
    "llama3": Family(
        *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "llama3"),
        pattern=_LLAMA3,
        tokens=_LLAMA3_TOKENS,
    ),
    "llama4": Family(
        *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad|>", "llama4"),
        pattern=_LLAMA4,
        tokens=_LLAMA4_TOKENS,
    ),
    "qwen": Family(
        *(None, "<|im_end|>", "<|endoftext|>", "chatml"),
        adds_bos=False,
        pattern=_QWEN,
        composed=True,
        tokens=_QWEN_TOKENS,
        visible=_QWEN_VISIBLE,
    ),
}

# By `model_type` in config.json, for a folder of weights with a raw tokenizer file.
FAMILY_OF_MODEL_TYPE = {
    "llama": "llama2",
    "mixtral": "mistral",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "llama4_text": "llama4",
    "qwen2": "qwen",
    "qwen3": "qwen",
}

# Of tekken files without a list of their own (versions up to 3), as mistral-common names them.
TEKKEN_TOKENS = [
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
]
