"""What is said: messages, and the problems that rows of data can have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

from graphtune.errors import UserError

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


class BadRow(UserError):
    """A row that cannot be used. Whoever reads rows adds the file and the row's number.

    Attributes:
        field: column, or path within one, such as `messages[2].role`.
        problem: what is wrong and what would be right.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem
