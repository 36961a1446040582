"""Conversations -> token ids, with labels on what the assistant says and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from graphtune.data.dataset import IGNORE_INDEX, Example
from graphtune.errors import UserError

Message = Mapping[str, str]
"""`{"role": "system" | "user" | "assistant" | ..., "content": text}`"""


class ConversationEncoder:
    """Encodes conversations with the tokenizer's chat template.

    The tokens that carry labels decode to each assistant turn followed by the token that ends
    it, so that the model learns to stop. All that comes before a turn is exactly what the model
    is given at generation: the template's rendering with `add_generation_prompt=True`. The
    template writes any beginning-of-sequence token itself; none is added here.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"model.id: the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "use the instruction-tuned variant of the model, or set tokenizer.chat_template"
            )
        self.tokenizer = tokenizer
        self.end_of_turn = self._find_end_of_turn()

    def __call__(self, messages: Sequence[Message]) -> Example:
        """Encode one conversation.

        Raises:
            UserError: malformed messages, or a chat template that renders the beginning of a
                conversation differently once it goes on.
        """
        _check(messages)
        text = self._render(messages)
        spans = self._assistant_spans(messages, text)
        ids, spans = self._tokenize(text, spans)
        labels = [IGNORE_INDEX] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        return Example(input_ids=ids, labels=labels)

    def _render(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation,
            )
        except TemplateError as error:
            raise UserError(
                f"dataset: the model's chat template refuses a conversation ({error}); "
                f"its roles are {[message['role'] for message in messages]}"
            ) from error
        assert isinstance(text, str)
        return text

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _find_end_of_turn(self) -> str:
        """What the template writes after an assistant's words, through the turn's last token."""
        words = "These are the assistant's words."
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": words}]
        rest = self._render(turns).partition(words)[2]
        tokens = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        ends = [rest.find(token) + len(token) for token in tokens if token in rest]
        return rest[: min(ends)] if ends else rest.rstrip()

    def _assistant_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Character spans of the assistant's turns in the rendered conversation."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [self._render(messages[:turn], generation=True) for turn in turns]
        starts = [len(prompt) for prompt in prompts]
        spans = []
        for turn, prompt, start, limit in zip(
            turns, prompts, starts, [*starts[1:], len(text)], strict=True
        ):
            if not text.startswith(prompt):
                raise UserError(
                    "dataset: the model's chat template renders the conversation before message "
                    f"{turn} differently once that message follows, so what generation sees "
                    "cannot be trained; shorten the conversations or use another template"
                )
            spans.append((start, self._turn_end(text, messages[turn]["content"], start, limit)))
        return spans

    def _turn_end(self, text: str, words: str, start: int, limit: int) -> int:
        for spelling in (words, words.strip()):  # templates may trim what was said
            at = text.find(spelling + self.end_of_turn, start, limit)
            if at >= 0:
                return at + len(spelling) + len(self.end_of_turn)
            if text.startswith(spelling, start):  # a turn that this template leaves open
                return start + len(spelling)
        raise UserError(
            "dataset: the model's chat template rewrites what the assistant says "
            f"({words[:40]!r}...), so it cannot be trained word for word; use another template"
        )

    def _tokenize(
        self, text: str, spans: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of the whole text, and the spans in tokens.

        Where a token would reach across a span's edge (a turn that begins with whitespace, say),
        the text is encoded in pieces cut at the edges: generation cuts there too.
        """
        cuts = [0, *(edge for span in spans for edge in span), len(text)]
        ids = self._encode(text)
        heads = [self._encode(text[:cut]) for cut in cuts]
        if all(ids[: len(head)] == head for head in heads):
            edges = [len(head) for head in heads]
        else:
            pieces = [self._encode(text[a:b]) for a, b in pairwise(cuts)]
            ids = [token for piece in pieces for token in piece]
            edges = [0, *accumulate(len(piece) for piece in pieces)]
        return ids, list(zip(edges[1:-1:2], edges[2:-1:2], strict=True))


def _check(messages: Sequence[Message]) -> None:
    well_formed = bool(messages) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not well_formed:
        raise UserError(
            "dataset: a conversation must be a list of messages with a text 'role' and a text "
            f"'content', not {str(messages)[:80]}"
        )
    if messages[0]["role"] == "assistant":
        raise UserError("dataset: a conversation must not begin with the assistant; add a prompt")
    if all(message["role"] != "assistant" for message in messages):
        raise UserError("dataset: a conversation has no assistant message to learn from")
