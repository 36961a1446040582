"""Conversations -> token ids, with labels on what the assistant says and nothing else."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema

from graphtune.data.dataset import IGNORE_INDEX, Example
from graphtune.data.fields import BadRow, ImagesFound
from graphtune.data.messages import Conversation, Message
from graphtune.data.rendering import ChatRenderer, Span, Turns
from graphtune.data.templates import Template, chat_template
from graphtune.errors import UserError

TrainOn = Literal["assistant", "last", "completion", "all"]
Tools = Sequence[dict[str, Any] | Callable[..., Any]]

_VERSION = 1  # raise it when the same conversation is encoded to something else than before


class _Tokens(NamedTuple):
    """Tokens, and where each starts and ends in the text (nothing if the tokenizer is slow)."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


class ConversationEncoder:
    """Encodes conversations with a chat template.

    The tokens that carry labels decode to assistant turns, each through the token that ends it,
    so that the model learns to stop. All that comes before a turn is exactly what the model is
    given at generation: the template's rendering with `add_generation_prompt=True`. The
    template writes any beginning-of-sequence token itself; none is added here.

    Where a template marks the assistant's turns with `{% generation %}`, its marks are used;
    otherwise what it renders for a turn beyond that turn's prompt is the turn. Some templates
    drop an earlier turn's reasoning once the conversation goes on: such a turn is no longer what
    the model would say, and carries no labels (a warning says so, once).

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: a name, mapping, Jinja text or file (`graphtune.data.templates`); None is the
            tokenizer's own.
        train_on: "assistant", every assistant turn; "last", the last of them; "completion",
            those after the last user message; "all", every token.
        tools: JSON schemas or documented functions that the template is shown.

    Attributes:
        template: the Jinja text; `tokenizer.chat_template = encoder.template` saves it with the
            tokenizer.
        renderer: knows the template's ways, such as `renderer.end_of_turn`.

    Raises:
        UserError: no such template, the tokenizer has none, or unknown `train_on`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: Template | None = None,
        train_on: TrainOn = "assistant",
        tools: Tools | None = None,
    ) -> None:
        if train_on not in get_args(TrainOn):
            choices = ", ".join(get_args(TrainOn))
            raise UserError(f"dataset.train_on: {train_on!r} is unknown; use one of {choices}")
        self.tokenizer = tokenizer
        self.template = chat_template(template, tokenizer)
        self.train_on = train_on
        self.tools = _schemas(tools or ())
        self.renderer = ChatRenderer(tokenizer, self.template)
        self._added = set(tokenizer.added_tokens_decoder)
        first = tokenizer.convert_ids_to_tokens(self._encode("a").ids[:1])
        self._adds_space = tokenizer.is_fast and first[0].startswith("\u2581")

    def __call__(self, messages: Conversation, tools: Tools | None = None) -> Example:
        """Encode one whole conversation.

        Args:
            messages: who says what; `weight` scales the loss of a turn, 0 leaves it out.
            tools: shown instead of the encoder's own.

        Returns:
            `weights`, the loss weight of each token, is there if some turn that is learned has
            another weight than 1.

        Raises:
            BadRow: malformed messages, or messages that the template refuses or rewrites.
            ImagesFound: one of them holds an image.
        """
        _refuse_images(messages)
        text, spans, weights = self._learned_turns(messages, tools)
        ids, spans = self._tokenize(text, spans)
        return self._label(ids, spans, weights)

    @cached_property
    def key(self) -> str:
        """Names all that decides the output, for caches: hexadecimal, 32 characters."""
        tokenizer = tokenizer_key(self.tokenizer)
        parts = [_VERSION, tokenizer, self.template, self.train_on, self.tools]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _learned_turns(
        self, messages: Conversation, tools: Tools | None
    ) -> tuple[str, list[Span], list[float]]:
        """The rendered conversation, its turns that `_label` must know, the messages' weights."""
        turns = self._clean(messages)
        weights = [_weight(message, i) for i, message in enumerate(messages)]
        if self.train_on == "all":
            chosen = [i for i, weight in enumerate(weights) if weight != 1]
            for i in chosen:
                if turns[i]["role"] != "assistant":
                    problem = "only the assistant's turns have weights when all are learned"
                    raise BadRow(f"messages[{i}].weight", problem)
        else:
            chosen = [i for i in self._candidates(turns) if weights[i] != 0]
        schemas = self.tools if tools is None else _schemas(tools)
        return *self.renderer.find_turns(turns, schemas, chosen), weights

    def _clean(self, messages: Conversation) -> Turns:
        """The messages as the template takes them.

        Keys without a value are left out, as by `apply_chat_template`: tables have every key in
        every row. A turn of nothing but tool calls has empty content, since templates add to it.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise BadRow("messages", f"must be a list of messages, not {messages!r:.60}")
        turns = [self._clean_message(message, i) for i, message in enumerate(messages)]
        speakers = [turn["role"] for turn in turns]
        if speakers[0] == "assistant":
            raise BadRow("messages[0].role", "must not be the assistant's; add a prompt")
        if "assistant" not in speakers and self.train_on != "all":
            raise BadRow("messages", "there is no assistant message to learn from")
        return turns

    def _clean_message(self, message: Message, i: int) -> dict[str, Any]:
        field = f"messages[{i}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRow(field, f"must have a text 'role', not be {message!r:.60}")
        turn = {k: v for k, v in message.items() if v is not None and k != "weight"}
        content = turn.setdefault("content", "" if turn.get("tool_calls") else None)
        if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
            if not self.renderer.takes_parts:
                turn["content"] = _join(content, f"{field}.content")
        elif not isinstance(content, str):
            raise BadRow(f"{field}.content", f"must be text, not {content!r:.60}")
        return turn

    def _candidates(self, turns: Turns) -> list[int]:
        """The messages that `train_on` names."""
        assistant = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if self.train_on == "last":
            return assistant[-1:]
        if self.train_on == "completion":
            asked = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
            assistant = [i for i in assistant if i > asked]
            if not assistant:
                raise BadRow("messages", "the assistant says nothing after the last user message")
        return assistant

    def _encode(self, text: str) -> _Tokens:
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,
        )
        offsets = encoded.get("offset_mapping", ())
        starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
        return _Tokens(encoded["input_ids"], starts, ends)

    def _tokenize(self, text: str, spans: list[Span]) -> tuple[list[int], list[Span]]:
        """Ids of the text, and the spans in tokens.

        Where a token would reach across a span's edge (a turn that begins with whitespace, say)
        or come out otherwise because of what follows, the text is encoded in pieces cut at that
        edge: generation cuts there too.
        """
        edges = sorted({edge for span in spans for edge in span[1:]})
        if self.tokenizer.is_fast:
            tokens = self._encode_cut(text, edges)
            ids, at = tokens.ids, {edge: bisect_left(tokens.starts, edge) for edge in edges}
        else:
            ids, at = self._tokenize_slowly(text, edges)
        return ids, [Span(message, at[start], at[end]) for message, start, end in spans]

    def _encode_cut(self, text: str, edges: list[int]) -> _Tokens:
        tokens, cuts = self._encode(text), list[int]()
        while missed := [e for e in edges if not self._splits_at(e, text, tokens, cuts)]:
            cuts = sorted([*cuts, *missed])
            tokens = self._encode_pieces(text, cuts)
        return tokens

    def _splits_at(self, edge: int, text: str, tokens: _Tokens, cuts: list[int]) -> bool:
        """Whether the tokens before `edge` are those of the text before it.

        They may differ even if no token reaches across, as tokenizers look ahead; but not
        across an added token.
        """
        ids, starts, ends = tokens
        if edge in cuts:
            return True
        if not _is_clean(starts, ends, edge):
            return False
        begin = max((cut for cut in cuts if cut < edge), default=0)
        after = first = bisect_left(starts, edge)
        while first and ids[first - 1] not in self._added and starts[first - 1] >= begin:
            first -= 1
        begin = max(begin, ends[first - 1] if first else 0)
        return first == after or self._encode(text[begin:edge]).ids == ids[first:after]

    def _encode_pieces(self, text: str, cuts: list[int]) -> _Tokens:
        whole = _Tokens([], [], [])
        for a, b in pairwise([0, *cuts, len(text)]):
            # A newline in front keeps sentencepiece from putting a space there. It is not joined
            # with what follows, or if it is, the space has to stay.
            anchor = 1 if self._adds_space and a else 0
            piece = self._encode("\n" * anchor + text[a:b])
            first = bisect_left(piece.starts, anchor)
            if anchor and (not first or piece.ends[first - 1] > anchor):
                anchor, first, piece = 0, 0, self._encode(text[a:b])
            whole.ids.extend(piece.ids[first:])
            whole.starts.extend(a + start - anchor for start in piece.starts[first:])
            whole.ends.extend(a + end - anchor for end in piece.ends[first:])
        return whole

    def _tokenize_slowly(self, text: str, edges: list[int]) -> tuple[list[int], dict[int, int]]:
        """Without offsets: as many tokens as the text through an edge has."""
        ids = self._encode(text).ids
        heads = [self._encode(text[:edge]).ids for edge in edges]
        if not all(ids[: len(head)] == head for head in heads):
            ids, heads = [], []
            for a, b in pairwise([0, *edges, len(text)]):
                ids = ids + self._encode(text[a:b]).ids
                heads.append(ids)
        return ids, {edge: len(head) for edge, head in zip(edges, heads, strict=False)}

    def _label(self, ids: list[int], spans: list[Span], weights: list[float]) -> Example:
        everything = self.train_on == "all"
        labels = list(ids) if everything else [IGNORE_INDEX] * len(ids)
        scale = [1.0 if everything else 0.0] * len(ids)
        for message, start, end in spans:
            weight = weights[message]
            labels[start:end] = ids[start:end] if weight else [IGNORE_INDEX] * (end - start)
            scale[start:end] = [weight] * (end - start)
        example = Example(input_ids=ids, labels=labels)
        if any(weight not in (0, 1) for weight in scale):
            example["weights"] = scale
        return example


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names all that decides what a tokenizer makes of a text: hexadecimal, 32 characters."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        backend.to_str() if backend else sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.special_tokens_map.items()),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _is_clean(starts: list[int], ends: list[int], edge: int) -> bool:
    """Whether one token ends at `edge`, and no token reaches across it."""
    before = bisect_left(starts, edge)
    return (ends[before - 1] if before else 0) == edge


def _schemas(tools: Tools) -> list[dict[str, Any]]:
    return [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]


def _join(parts: list[Mapping[str, Any]], field: str) -> str:
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRow(field, f"the chat template takes text only, not {part!r:.60}")
    return "".join(part["text"] for part in parts)


def _weight(message: Mapping[str, Any], i: int) -> float:
    weight = message.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e9:
        raise BadRow(f"messages[{i}].weight", f"must be a number from 0 on, not {weight!r:.60}")
    return float(weight)


def _refuse_images(messages: Conversation) -> None:
    """Raise ImagesFound at the first image; what else may be wrong is seen to later."""
    for i, message in enumerate(messages if isinstance(messages, list | tuple) else ()):
        content = message.get("content") if isinstance(message, Mapping) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, Mapping) and part.get("type") == "image":
                raise ImagesFound(
                    f"messages[{i}].content[{j}]: an image, where text alone is read; a model that "
                    "takes images reads it with `model.images=true`"
                )
