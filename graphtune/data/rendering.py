"""Conversations -> text by a chat template, and where each turn lies in it."""

from __future__ import annotations

import logging
import re
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from graphtune.data.fields import BadRow
from graphtune.errors import UserError

logger = logging.getLogger(__name__)

Turns = list[dict[str, Any]]
"""Messages as templates take them."""
Tools = list[dict[str, Any]]
"""JSON schemas."""
Marks = list[tuple[int, int]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Span(NamedTuple):
    """Where the turn of a message lies, in characters or tokens."""

    message: int
    start: int
    end: int


class Refused(Exception):
    """The template cannot render a conversation."""


class ChatRenderer:
    """Renders conversations by a chat template and finds the assistant's turns.

    Where the template marks them with `{% generation %}`, its marks are used; otherwise the
    turn is what is rendered for it beyond the prompt for it, through the token that ends it. A
    turn that is rendered differently once the conversation goes on is not what the model would
    say, nor what it will see: it is not found, and a warning says so once.

    Subclasses may override `render`.

    Args:
        tokenizer: whose special tokens the template is given.
        template: Jinja text.

    Attributes:
        end_of_turn: what the template writes after the assistant's words.
        takes_parts: whether it takes content as a list of parts, too.

    Raises:
        UserError: the template cannot render a question and its answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._special_tokens = tokenizer.special_tokens_map
        self._marked = bool(_GENERATION.search(template))
        self._warned = False
        self._probe()

    def render(self, turns: Turns, tools: Tools, *, generation: bool = False) -> tuple[str, Marks]:
        """The text, and the spans that the template marks."""
        render: Any = render_jinja_template  # its annotations leave out what it returns
        try:
            texts, marks = render(
                conversations=[turns],
                tools=tools or None,
                chat_template=self.template,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=generation,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise Refused(str(error) or type(error).__name__) from error
        return texts[0], marks[0] if self._marked else []

    def _probe(self) -> None:
        """Learn the template's ways from small conversations."""
        words = "These are the assistant's words."
        asked: Turns = [{"role": "user", "content": "Hi"}]
        said = [*asked, {"role": "assistant", "content": words}]
        try:
            text, marks = self.render(said, [])
            prompt = self.render(asked, [], generation=True)[0]
            longer = self.render(said + said, [])[0]
        except Refused as error:
            raise UserError(
                f"dataset.template: the chat template refuses a question and its answer ({error})"
            ) from error
        rest = text.partition(words)[2]
        if marks:
            self.end_of_turn = text[: marks[-1][1]].rpartition(words)[2]
        else:
            tokens = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
            ends = [rest.find(token) + len(token) for token in tokens if token in rest]
            self.end_of_turn = rest[: min(ends)] if ends else rest.rstrip()
        self._opening = text[len(prompt) :].partition(words)[0]
        turn = text[: len(text) - len(rest) + len(self.end_of_turn)]
        self._rewrites = not (text.startswith(prompt) and longer.startswith(turn))
        self.takes_parts = self._renders_parts(text, words)

    def _renders_parts(self, text: str, words: str) -> bool:
        parts = [{"type": "text", "text": words}]
        said: Turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": parts}]
        try:
            return self.render(said, [])[0] == text
        except Refused:
            return False

    def find_turns(self, turns: Turns, tools: Tools, chosen: list[int]) -> tuple[str, list[Span]]:
        """The rendered conversation, and the turns of the chosen messages in it.

        Raises:
            BadRow: the template refuses or rewrites the conversation, or no turn is found.
        """
        try:
            text, marks = self.render(turns, tools)
            found = [self._find_turn(turns, tools, i, text, marks) for i in chosen]
        except Refused as error:
            raise self._explain(turns, tools, error) from error
        spans = [Span(i, *span) for i, span in zip(chosen, found, strict=True) if span]
        if None in found:
            self._report_lost(chosen[found.index(None)], bool(spans))
        return text, spans

    def _find_turn(
        self, turns: Turns, tools: Tools, i: int, text: str, marks: Marks
    ) -> tuple[int, int] | None:
        """Where message `i` lies in `text`; None if it is not what generation would see."""
        # What a template is known to rewrite later on: its own additions, reasoning, tool calls.
        unsure = self._rewrites or any(_is_rich(turn) for turn in turns)
        speakers = [j for j, turn in enumerate(turns) if turn["role"] == "assistant"]
        if len(marks) != len(speakers):
            return self._find_unmarked(turns, tools, i, text, unsure)
        mark = marks[speakers.index(i)]
        if unsure and i < len(turns) - 1:
            alone, marks = self.render(turns[: i + 1], tools)
            if marks[-1:] != [mark] or not text.startswith(alone[: mark[1]]):
                return None
        return mark

    def _find_unmarked(
        self, turns: Turns, tools: Tools, i: int, text: str, unsure: bool
    ) -> tuple[int, int] | None:
        """As `_find_turn`, without marks: the turn begins where the prompt for it ends."""
        prompt = self.render(turns[:i], tools, generation=True)[0]
        if not text.startswith(prompt):
            return None
        start = len(prompt)
        words = turns[i]["content"]
        if isinstance(words, str) and not unsure:  # no need to render once more
            for spelling in (words, words.strip()):  # templates may trim what was said
                said = self._opening + spelling + self.end_of_turn
                if text.startswith(said, start):
                    return start, start + len(said)
        alone = text if i == len(turns) - 1 else self.render(turns[: i + 1], tools)[0]
        said = alone[start:]
        end = said.rfind(self.end_of_turn)
        said = said[: end + len(self.end_of_turn)] if end >= 0 else said
        if isinstance(words, str) and words.strip() not in said and "</think>" not in words:
            raise BadRow(
                f"messages[{i}].content",
                f"the chat template rewrites what the assistant says ({words[:40]!r}...), so it "
                "cannot be trained word for word; use another template",
            )
        if not alone.startswith(prompt) or not text.startswith(said, start):
            return None
        return start, start + len(said)

    def _report_lost(self, i: int, others: bool) -> None:
        problem = (
            "the chat template renders the conversation through this message differently once it "
            "goes on, so what generation sees cannot be trained"
        )
        if not others:
            raise BadRow(f"messages[{i}]", f"{problem}; use another template")
        if not self._warned:
            self._warned = True
            logger.warning(
                "messages[%d]: %s; this turn and others like it are left out of the loss. To "
                "learn them, end a conversation with each, or use another template",
                i,
                problem,
            )

    def _explain(self, turns: Turns, tools: Tools, error: Exception) -> BadRow:
        """Name the first message without which the template would not have refused."""
        for i in range(1, len(turns)):
            try:
                self.render(turns[:i], tools)
            except Refused as refused:
                if str(refused) == str(error):
                    return BadRow(f"messages[{i - 1}]", f"the chat template refuses it ({error})")
        last = len(turns) - 1
        return BadRow(f"messages[{last}]", f"the chat template refuses it ({error})")


def _is_rich(turn: dict[str, Any]) -> bool:
    content = turn["content"]
    thinks = isinstance(content, str) and "</think>" in content
    return thinks or bool(turn.get("tool_calls") or turn.get("reasoning_content"))
