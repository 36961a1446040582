"""A tokenizer as the fields of a GGUF file, such that llama.cpp splits text as it does."""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from graphtune.errors import UserError

# llama.cpp knows how text is split before merges by names; of several for one split, these.
_NAMES = ("llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35")


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, stop_ids: list[int]
) -> None:
    """Write vocabulary, merges, special tokens and chat template.

    Args:
        writer: of the file.
        tokenizer: a byte-level BPE, or a BPE of sentencepiece's kind, with a `tokenizer.json`.
        rows: of the embedding; tokens are padded to as many.
        stop_ids: what ends an answer; the first that is not the tokenizer's own end token is
            written as the end of a turn.

    Raises:
        UserError: GGUF has no form for the tokenizer, or it has ids beyond the embedding.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = (
        json.loads(backend.to_str()) if backend is not None else {"model": {"type": None}}
    )
    model = content["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"to_gguf: llama.cpp has no form for a tokenizer of type {model['type']}; "
            "a BPE is needed, or pass no tokenizer"
        )
    tokens, types = _vocabulary(content, rows)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    split = _split(content.get("pre_tokenizer"))
    if split is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
    elif model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(content))
        types = [TokenType.BYTE if _is_byte(t) else kind for t, kind in zip(tokens, types)]  # noqa: B905
        if model.get("unk_token") is not None:
            types[tokens.index(model["unk_token"])] = TokenType.UNKNOWN
    else:
        raise UserError(
            "to_gguf: llama.cpp has no name for how this tokenizer splits text before its merges "
            f"({json.dumps(content.get('pre_tokenizer'))[:200]}); pass no tokenizer"
        )
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp merges sentencepiece tokens by their scores; transformers reads these.
    if all(merge.count(" ") == 1 for merge in merges):
        writer.add_token_merges(merges)
    _add_special(writer, tokenizer, stop_ids)


def _vocabulary(content: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Tokens by id, and what kind each is; ids that nothing has are unused."""
    by_id: dict[int, tuple[str, int]] = {
        index: (token, TokenType.NORMAL) for token, index in content["model"]["vocab"].items()
    }
    for added in content.get("added_tokens", ()):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    if by_id and max(by_id) >= rows:
        raise UserError(
            f"to_gguf: the tokenizer has the id {max(by_id)}, and the model {rows} embeddings; "
            "resize the model's, or load the tokenizer that goes with it"
        )
    entries = [by_id.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(rows)]
    return [token for token, _ in entries], [int(kind) for _, kind in entries]


def _split(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer splits text; None if it has none."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        pattern = steps[0]["pattern"].get("Regex")
        return next((n for n in _NAMES if GGUF_PRE_TOKENIZER_SPLITS.get(n) == pattern), None)
    return None


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """sentencepiece merges what has the highest score first: here the rank of the merge."""
    rank: dict[str, int] = {}
    for position, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), position)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _adds_space(content: dict[str, Any]) -> bool:
    """Whether text gets a space in front."""
    pre_tokenizer, normalizer = content.get("pre_tokenizer") or {}, content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return pre_tokenizer.get("prepend_scheme") in ("first", "always") or any(
        step.get("type") == "Prepend" for step in steps
    )


def _add_special(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]
) -> None:
    others = [index for index in stop_ids if index != tokenizer.eos_token_id]
    if others:
        writer.add_eot_token_id(others[0])
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by what they are for
        template = template.get("default")
    if template:
        writer.add_chat_template(template)
