"""From what people say to ids, and where an answer ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from graphtune.data import ConversationEncoder
from graphtune.errors import UserError
from graphtune.program import Program


def encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None) -> list[int]:
    """The ids of a prompt in the model's chat template; of the bare text if it has none."""
    if not tokenizer.chat_template:
        return tokenizer.encode(f"{system}\n\n{prompt}" if system else prompt)
    messages = [{"role": "user", "content": prompt}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return encode_messages(tokenizer, messages)


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> list[int]:
    """The ids of a conversation, up to where the assistant speaks next.

    Args:
        messages: each with `role` and `content`.

    Raises:
        UserError: the tokenizer has no chat template, or it cannot render this conversation.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template, so that a conversation has no text")
    turns: Any = list(messages)
    try:
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise UserError(f"the chat template refuses the conversation: {error}") from error
    return list(ids)


def stop_ids(program: Program, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer: the tokenizer's end of sequence, what the config adds, and what
    the chat template writes after the assistant's words (Llama 3's `<|eot_id|>`, say)."""
    configured = getattr(program.config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    ends = {i for i in (tokenizer.eos_token_id, *configured) if i is not None}
    return ends | _end_of_turn(tokenizer)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special token that ends a turn; none without a template, or if a turn ends in text."""
    if not tokenizer.chat_template:
        return set()
    try:
        written = ConversationEncoder(tokenizer).renderer.end_of_turn
    except UserError:  # a template that takes other conversations than a question and an answer
        return set()
    ids = tokenizer.encode(written.rstrip(), add_special_tokens=False)
    return {i for i in ids[-1:] if i in tokenizer.added_tokens_decoder}
