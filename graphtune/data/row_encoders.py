"""What becomes of one row: format, then tokens.

Functions of a module, so that `functools.partial` of them can be sent to other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from graphtune.data import fields, formats
from graphtune.data.conversations import ConversationEncoder
from graphtune.data.dataset import IGNORE_INDEX, Example
from graphtune.data.fields import BadRow
from graphtune.data.messages import Message
from graphtune.data.rows import Row


def conversation(
    encoder: Any, convert: Callable[[Row], list[Message]], row: Row
) -> Mapping[str, Any]:
    return encoder(convert(row), tools=formats.tools(row))


def text(tokenizer: PreTrainedTokenizerBase, column: str, eos: int | None, row: Row) -> Example:
    ids = tokenizer.encode(fields.text(row, column), verbose=False)
    if eos is not None and ids[-1:] != [eos]:
        ids = [*ids, eos]
    return Example(input_ids=ids, labels=[IGNORE_INDEX, *ids[1:]])


def pair(
    encoder: Any, convert: Callable[[Row], formats.PreferencePair], row: Row
) -> Mapping[str, Any]:
    prompt, chosen, rejected = convert(row)
    prompt, tools = formats.unlearned(prompt), formats.tools(row)
    answers = {"chosen": chosen, "rejected": rejected}
    return {name: encoder([*prompt, *said], tools=tools) for name, said in answers.items()}


def judged(encoder: Any, convert: Callable[[Row], formats.Judged], row: Row) -> Mapping[str, Any]:
    prompt, completion, label = convert(row)
    messages = [*formats.unlearned(prompt), *completion]
    return {**encoder(messages, tools=formats.tools(row)), "label": label}


def steps(
    tokenizer: PreTrainedTokenizerBase,
    convert: Callable[[Row], formats.Steps],
    end: list[int],
    last_step_only: bool,
    row: Row,
) -> Example:
    prompt, steps, labels = convert(row)
    ids = tokenizer.encode(prompt, add_special_tokens=False, verbose=False)
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    targets = [IGNORE_INDEX] * len(ids)
    for number, (step, label) in enumerate(zip(steps, labels, strict=True), start=1):
        tokens = tokenizer.encode(step, add_special_tokens=False, verbose=False) + end
        counts = number == len(steps) or not last_step_only
        ids += tokens
        targets += [IGNORE_INDEX] * (len(tokens) - 1) + [int(label) if counts else IGNORE_INDEX]
    return Example(input_ids=ids, labels=targets)


def question(
    encoder: Any, convert: Callable[[Row], formats.Question], row: Row
) -> Mapping[str, Any]:
    prompt, columns = convert(row)
    if "prompt_ids" in columns:
        raise BadRow("prompt_ids", "the tokens of the prompt get this name; rename the column")
    return {**columns, "prompt_ids": _prompt_ids(encoder, prompt, formats.tools(row))}


def _prompt_ids(
    encoder: ConversationEncoder, prompt: list[Message], tools: list[dict[str, Any]] | None
) -> list[int]:
    """Tokens of a conversation up to where the assistant begins to speak."""
    for i, message in enumerate(prompt):
        if isinstance(message["content"], list):  # text alone is joined when it is read
            raise BadRow(f"messages[{i}].content", "questions with images cannot be asked yet")
    turns = [{key: value for key, value in turn.items() if key != "weight"} for turn in prompt]
    try:
        ids: Any = encoder.tokenizer.apply_chat_template(
            cast(Any, turns),
            chat_template=encoder.template,
            tools=cast(Any, encoder.tools if tools is None else tools),
            add_generation_prompt=True,
            return_dict=False,
        )
    except TemplateError as error:
        raise BadRow("messages", f"the chat template refuses them ({error})") from error
    return list(ids)
