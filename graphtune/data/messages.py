"""What is said: messages, as data sets write them and as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from graphtune.data.fields import BadRow, check_characters, checked_text, number
from graphtune.data.rows import close_match

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it.

    role: who speaks.
    content: text, or a list of parts `{"type": "text", "text": ...}` and
        `{"type": "image", "image": path, URL, bytes, base64 or PIL.Image}`; None where the turn
        is nothing but tool calls.
    tool_calls: of an assistant: `{"type": "function", "function": {"name", "arguments"}}`.
    tool_call_id, name: of a tool's result.
    reasoning_content: what the assistant thought before it spoke.
    weight: how much the turn's tokens count in the loss; default 1, 0 leaves them out.
    """

    role: Role
    content: str | list[dict[str, Any]] | None
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    weight: NotRequired[float]


Conversation = Sequence[Message]


ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
"""The names that roles have in OpenAI's, ShareGPT's and torchtune's data."""

_IMAGE_TAG = "<image>"
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")
_REASONING = ("reasoning_content", "reasoning", "thinking")


def read_messages(value: Any, field: str) -> list[Message]:
    """A list of OpenAI's or ShareGPT's messages; each is read by the keys that it has.

    Keys that are None count as missing, as Arrow fills in those that other rows have. The
    arguments of tool calls, which OpenAI writes as JSON text, become mappings, as chat
    templates take them.
    """
    if not isinstance(value, list | tuple):
        raise BadRow(field, f"must be a list of messages, not {value!r:.60}")
    if not value:
        raise BadRow(field, "must not be empty")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _message(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow(field, f"must be a message with a role and content, not {value!r:.60}")
    given = {key: item for key, item in value.items() if item is not None}
    sharegpt = "from" in given and "role" not in given
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    spoken = _required(given, role_key, field)
    role = _role(spoken, f"{field}.{role_key}")
    if spoken == "function_call":
        message = Message(role=role, content=None)
        message["tool_calls"] = _tool_calls(given.get(content_key), f"{field}.{content_key}")
    else:
        message = Message(role=role, content=_content(given, content_key, role, field))
        calls = given.get("tool_calls") or given.get("function_call")
        if calls:
            key = "tool_calls" if given.get("tool_calls") else "function_call"
            if role != "assistant":
                raise BadRow(f"{field}.{key}", f"only the assistant calls tools, not the {role}")
            message["tool_calls"] = _tool_calls(calls, f"{field}.{key}")
    for key in ("tool_call_id", "name"):
        if given.get(key):
            message[key] = checked_text(given[key], f"{field}.{key}")  # type: ignore[literal-required]
    for key in _REASONING:
        if given.get(key):
            message["reasoning_content"] = checked_text(given[key], f"{field}.{key}")
            break
    if "weight" in given:
        message["weight"] = number(given["weight"], f"{field}.weight")
    return message


def _required(given: Mapping[str, Any], key: str, field: str) -> Any:
    if key not in given:
        raise BadRow(f"{field}.{key}", f"it is missing; {close_match(key, given)}")
    return given[key]


def _role(value: Any, field: str) -> Role:
    if not isinstance(value, str) or value not in ROLES:
        raise BadRow(field, f"{value!r:.40} is no role; {close_match(str(value), ROLES)}")
    return ROLES[value]


def _content(given: Mapping[str, Any], key: str, role: Role, field: str) -> Any:
    """Text, or parts if some are images; None for a turn that only calls tools."""
    calls = given.get("tool_calls") or given.get("function_call")
    content = given.get(key)
    if role == "assistant" and calls and content in (None, "", []):
        return None
    if role == "tool" and content == "":
        return ""  # a tool may have nothing to say
    field = f"{field}.{key}"
    if content is None:
        _required(given, key, field.removesuffix(f".{key}"))
    if not isinstance(content, list | tuple):
        return checked_text(content, field)
    parts = [_part(part, f"{field}[{i}]") for i, part in enumerate(content)]
    if any(part["type"] == "image" for part in parts):
        return parts
    return checked_text("".join(part["text"] for part in parts), field)


def _part(value: Any, field: str) -> dict[str, Any]:
    """One part of a content list, as text or as an image that may be filled in later."""
    if isinstance(value, str):
        value = {"type": "text", "text": value}
    if not isinstance(value, Mapping):
        raise BadRow(field, f"must be a part with a type, not {value!r:.60}")
    part = {key: item for key, item in value.items() if item is not None}
    kind = part.get("type")
    if kind == "text":
        content = _required(part, "text", field)
        if not isinstance(content, str):
            raise BadRow(f"{field}.text", f"must be text, not {content!r:.60}")
        check_characters(content, f"{field}.text")
        return {"type": "text", "text": content}
    if kind in ("image", "image_url"):
        image = next((part[key] for key in _IMAGE_KEYS if key in part), None)
        if kind == "image_url" and isinstance(image, Mapping):
            image = _required(image, "url", f"{field}.image_url")
        return {"type": "image"} | ({} if image is None else {"image": image})
    raise BadRow(f"{field}.type", f"{kind!r} is unknown; use text, image or image_url")


def _tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """OpenAI's list, its older single call, or ShareGPT's JSON text of either."""
    value = _from_json(value, field) if isinstance(value, str) else value
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, list | tuple) or not calls:
        raise BadRow(field, f"must be a list of calls, not {value!r:.60}")
    return [_tool_call(call, f"{field}[{i}]") for i, call in enumerate(calls)]


def _tool_call(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRow(field, f"must be a call with a function, not {value!r:.60}")
    function = value.get("function") or value
    where = f"{field}.function" if value.get("function") else field
    if not isinstance(function, Mapping):
        raise BadRow(where, f"must have a name and arguments, not {function!r:.60}")
    name = checked_text(_required(function, "name", where), f"{where}.name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments or "{}", f"{where}.arguments")
    if not isinstance(arguments, Mapping | None):
        raise BadRow(f"{where}.arguments", f"must be a mapping, not {arguments!r:.60}")
    call: dict[str, Any] = {"type": "function"}
    if value.get("id"):
        call["id"] = checked_text(value["id"], f"{field}.id")
    return call | {"function": {"name": name, "arguments": dict(arguments or {})}}


def _from_json(value: str, field: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(field, f"not valid JSON ({error})") from error


def fill_images(messages: Sequence[Message], column: tuple[str, list[Any]]) -> list[Message]:
    """Put the images of a row into its messages, in order.

    They go to image parts without an image, or to `<image>` tags in text; if there are neither,
    to the front of the first user's turn. Tags in rows without images stay text.

    Args:
        messages: the row's.
        column: the images' column, and its images.
    """
    name, images = column
    if not images:
        _refuse_empty_parts(messages, name)
        return list(messages)
    filled = [_split_tags(message) for message in messages]
    if not any(_is_open(part) for message in filled for part in _parts(message)):
        first = next((i for i, message in enumerate(filled) if message["role"] == "user"), None)
        if first is None:
            raise BadRow(name, "there is no user's turn to put them in")
        opening = [{"type": "image"} for _ in images]
        filled[first] = {**filled[first], "content": [*opening, *_as_parts(filled[first])]}
    places = sum(_is_open(part) for message in filled for part in _parts(message))
    if places != len(images):
        raise BadRow(name, f"there are {len(images)} images for {places} places in the messages")
    rest = iter(images)
    return [
        {
            **message,
            "content": [
                {**part, "image": next(rest)} if _is_open(part) else part
                for part in _parts(message)
            ],
        }
        if _parts(message)
        else message
        for message in filled
    ]


def _refuse_empty_parts(messages: Sequence[Message], column: str) -> None:
    for i, message in enumerate(messages):
        if any(_is_open(part) for part in _parts(message)):
            raise BadRow(column, f"message {i} has a place for an image, but the row has none")


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else []


def _is_open(part: Mapping[str, Any]) -> bool:
    return part["type"] == "image" and "image" not in part


def _as_parts(message: Message) -> list[dict[str, Any]]:
    return _parts(message) or [{"type": "text", "text": message["content"]}]


def _split_tags(message: Message) -> Message:
    """The message with each `<image>` in its text as an image part."""
    if message["role"] not in ("user", "system") or not isinstance(message["content"], str):
        return message
    head, *others = message["content"].split(_IMAGE_TAG)
    if not others:
        return message
    parts = [{"type": "text", "text": head}]
    for piece in others:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return {**message, "content": [part for part in parts if part.get("text") != ""]}


def check_conversation(
    messages: Conversation, field: str = "messages", *, needs_assistant: bool = True
) -> None:
    """Refuse a conversation that no chat template is made for.

    A system message comes first or not at all; then the user begins; nobody speaks twice in a
    row, but for tools, whose results answer the calls of the assistant's turn before them.

    Raises:
        BadRow: names the message.
    """
    if not messages:
        raise BadRow(field, "must not be empty")
    calls: list[dict[str, Any]] = []  # of the last assistant's turn that are not answered
    before: str | None = None
    for i, message in enumerate(messages):
        role = message["role"]
        where = f"{field}[{i}]"
        if role == "system" and i:
            raise BadRow(f"{where}.role", "a system message must be the first")
        if role in ("assistant", "tool") and before in (None, "system"):
            raise BadRow(f"{where}.role", f"the user must speak before the {role}")
        if role == before and role != "tool":
            raise BadRow(f"{where}.role", f"the {role} speaks twice in a row; join the two turns")
        if role == "tool":
            _answer(message, calls, where)
        else:
            calls = _calls(message)
        before = role
    if needs_assistant and all(message["role"] != "assistant" for message in messages):
        raise BadRow(field, "there is no assistant's turn to learn from")


def _calls(message: Message) -> list[dict[str, Any]]:
    """The calls of a turn; those that it writes into its text, as Hermes's data do, have no id."""
    written = str(message["content"]).count("<tool_call>") if message["role"] == "assistant" else 0
    return list(message.get("tool_calls", [])) or [{} for _ in range(written)]


def _answer(message: Message, calls: list[dict[str, Any]], where: str) -> None:
    """Take the call that a tool's message answers off `calls`."""
    if not calls:
        raise BadRow(f"{where}.role", "a tool's result must follow a tool call of the assistant")
    id = message.get("tool_call_id")
    ids = [call.get("id") for call in calls]
    if id is not None and any(ids) and id not in ids:
        raise BadRow(
            f"{where}.tool_call_id",
            f"{id!r} is no call before it; {close_match(id, filter(None, ids))}",
        )
    calls.pop(ids.index(id) if id in ids else 0)
