"""What rows say: from the columns of common data sets to messages.

Each function takes a row and returns messages, or raises BadRow, which names the field and what
would be right. Nothing here tokenizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from graphtune.data.fields import BadRow, cell, cell_list, has, text, truth
from graphtune.data.messages import Message, check_conversation, fill_images, read_messages
from graphtune.data.rows import Row

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns that `chat` looks for if none is named, in this order."""

IMAGES = ("images", "image")


class PreferencePair(NamedTuple):
    """Two answers to one prompt; the prompt ends before an assistant's turn."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


class Judged(NamedTuple):
    """A prompt, its completion, and whether it is a good one."""

    prompt: list[Message]
    completion: list[Message]
    label: bool


class Steps(NamedTuple):
    """A problem, the steps of a solution, and whether each is right."""

    prompt: str
    steps: list[str]
    labels: list[bool]


class Question(NamedTuple):
    """A prompt, and every other column of its row, for reward functions."""

    prompt: list[Message]
    columns: dict[str, Any]


def alpaca(row: Row, *, system: str | None = None) -> list[Message]:
    """`instruction`, `input` (may be empty or missing) and `output`, as in Stanford Alpaca.

    The prompt is the instruction, and the input below it where there is one.
    """
    prompt = text(row, "instruction")
    if has(row, "input"):
        prompt = f"{prompt}\n\n{text(row, 'input')}"
    return conversation(prompt, text(row, "output"), system)


def instruct(
    row: Row,
    *,
    prompt_column: str = "prompt",
    response_column: str | None = None,
    system_column: str | None = None,
    system: str | None = None,
) -> list[Message]:
    """A prompt and a response: texts, or lists of messages. Of a list of messages as a prompt
    nothing is learned; a text is the user's turn, which `train_on: all` can learn.

    Args:
        row: the data.
        prompt_column, response_column: their columns; the response's default is `response` or
            `completion`, whichever there is.
        system_column: column with a system message, which may be empty.
        system: the system message of rows that have none.
    """
    response_column = response_column or ("completion" if "completion" in row else "response")
    if system_column is not None and has(row, system_column):
        system = text(row, system_column)
    prompt = turns(row, prompt_column, "user")
    if not isinstance(row[prompt_column], str):
        prompt = unlearned(prompt)
    response = turns(row, response_column, "assistant")
    messages = with_system([*prompt, *response], system)
    messages = fill_images(messages, _images(row, None))
    check_conversation(messages, response_column)
    return messages


def chat(
    row: Row,
    *,
    messages_column: str | None = None,
    images_column: str | None = None,
    system: str | None = None,
) -> list[Message]:
    """A conversation of any number of turns, as OpenAI or ShareGPT write it.

    OpenAI: `role`, `content` (text or parts), `tool_calls`, `tool_call_id`,
    `reasoning_content`, `weight`. ShareGPT: `from` (human, gpt, system, function_call,
    observation) and `value`.

    Args:
        row: the data.
        messages_column: column with the messages; None: the first of `CONVERSATIONS` there is.
        images_column: column with images for the messages' image parts or `<image>` tags, in
            order; None: `images` or `image`, if there is one.
        system: a system message, in place of any that the conversation has.
    """
    if messages_column is None:
        messages_column = next((name for name in CONVERSATIONS if name in row), CONVERSATIONS[0])
    messages = read_messages(cell(row, messages_column), messages_column)
    if system is None and messages[0]["role"] != "system" and has(row, "system"):
        system = text(row, "system")
    messages = fill_images(with_system(messages, system), _images(row, images_column))
    check_conversation(messages, messages_column)
    return messages


def preference(
    row: Row,
    *,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    system: str | None = None,
) -> PreferencePair:
    """Two answers to one prompt.

    Either the prompt has a column and the two are texts or lists of messages that begin with
    the assistant; or they are whole conversations, and the turns that both begin with are the
    prompt.
    """
    chosen = turns(row, chosen_column, "assistant")
    rejected = turns(row, rejected_column, "assistant")
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        prompt = turns(row, prompt_column, "user")
    else:
        prompt, chosen, rejected = _split_shared(chosen, rejected, rejected_column)
    if chosen == rejected:
        raise BadRow(rejected_column, f"it says the same as `{chosen_column}`")
    prompt = with_system(prompt, system)
    for column, answer in ((chosen_column, chosen), (rejected_column, rejected)):
        _check_completion(prompt, answer, column)
    prompt = fill_images(prompt, _images(row, None))
    return PreferencePair(prompt, chosen, rejected)


def unpaired(
    row: Row,
    *,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    label_column: str = "label",
    system: str | None = None,
) -> Judged:
    """A prompt, one completion (texts or lists of messages) and a boolean label."""
    prompt = with_system(turns(row, prompt_column, "user"), system)
    completion = turns(row, completion_column, "assistant")
    _check_completion(prompt, completion, completion_column)
    prompt = fill_images(prompt, _images(row, None))
    return Judged(prompt, completion, truth(cell(row, label_column), label_column))


def stepwise(
    row: Row,
    *,
    prompt_column: str = "prompt",
    steps_column: str = "completions",
    labels_column: str = "labels",
) -> Steps:
    """A problem, the steps of a solution (a list of texts), and a boolean for each."""
    prompt = text(row, prompt_column)
    steps = [
        text({name: step}, name)
        for i, step in enumerate(cell_list(row, steps_column))
        for name in [f"{steps_column}[{i}]"]
    ]
    labels = [
        truth(label, f"{labels_column}[{i}]")
        for i, label in enumerate(cell_list(row, labels_column))
    ]
    if len(labels) != len(steps):
        raise BadRow(labels_column, f"there are {len(labels)} for {len(steps)} steps")
    return Steps(prompt, steps, labels)


def question(
    row: Row,
    *,
    prompt_column: str = "prompt",
    answer_column: str | None = "answer",
    system: str | None = None,
) -> Question:
    """A prompt to answer (text or messages), and all other columns as they are.

    `answer_column` must be there and not be empty; None where no answer is known.
    """
    prompt = with_system(turns(row, prompt_column, "user"), system)
    check_conversation(prompt, prompt_column, needs_assistant=False)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise BadRow(prompt_column, "it must end with the user, or there is nothing to answer")
    if answer_column is not None and cell(row, answer_column) in (None, "", []):
        raise BadRow(answer_column, "must not be empty")
    columns = {name: value for name, value in row.items() if name != prompt_column}
    return Question(fill_images(prompt, _images(row, None)), columns)


def conversation(prompt: str, response: str, system: str | None = None) -> list[Message]:
    """One question and its answer as messages."""
    messages: list[Message] = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response},
    ]
    return with_system(messages, system)


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """`messages`, led by `system` in place of a system message that they have; None: as is."""
    if system is None:
        return list(messages)
    rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": system}, *rest]


def unlearned(messages: Sequence[Message]) -> list[Message]:
    """`messages`, left out of the loss."""
    return [{**message, "weight": 0.0} for message in messages]


def turns(row: Row, column: str, speaker: str) -> list[Message]:
    """A cell as messages: a list of them, one of them, or a text, which `speaker` says."""
    value = cell(row, column)
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        value = [value]
    if isinstance(value, list | tuple):
        return read_messages(value, column)
    return [{"role": speaker, "content": text(row, column)}]  # type: ignore[typeddict-item]


def _images(row: Row, column: str | None) -> tuple[str, list[Any]]:
    """The column of images and what it holds; without such a column, no images."""
    if column is None:
        column = next((name for name in IMAGES if row.get(name) is not None), None)
        if column is None:
            return IMAGES[0], []
    value = cell(row, column)
    return column, list(value) if isinstance(value, list | tuple) else [value]


def _split_shared(
    chosen: list[Message], rejected: list[Message], column: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Two conversations -> the turns that both begin with, and the rest of each."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        shared -= 1  # equal to the end, which the caller refuses
    if not shared:
        raise BadRow(f"{column}[0]", "the two conversations must begin with the same prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _check_completion(prompt: list[Message], completion: list[Message], column: str) -> None:
    if not completion or completion[0]["role"] != "assistant":
        raise BadRow(column, "after the prompt, it must go on with the assistant")
    check_conversation([*prompt, *completion], column)


def tools(row: Row) -> list[dict[str, Any]] | None:
    """The `tools` column: JSON schemas as a list, or as JSON text of one; None without it."""
    if not has(row, "tools") or row["tools"] == []:
        return None
    value = row["tools"]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow("tools", f"not valid JSON ({error})") from error
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow("tools", f"must be a list of JSON schemas, not {value!r:.60}")
    return [dict(tool) for tool in value]
