"""Data sets for configs: `dataset: {_component_: graphtune.data.instruct, source: ...}`.

Each takes the model's tokenizer, reads rows (`RowOptions`), understands them in one format
(`graphtune.data.formats`) and encodes them. Options that several builders share are documented
in `RowOptions`, `EncodeOptions` and `ChatOptions`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack, cast

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from graphtune.data import formats, row_encoders
from graphtune.data.conversations import ConversationEncoder, Tools, TrainOn, tokenizer_key
from graphtune.data.dataset import Dataset, Truncate
from graphtune.data.encoding import encode_rows
from graphtune.data.fields import ImagesFound
from graphtune.data.messages import Message
from graphtune.data.rows import Row, RowOptions, Source, close_match, read_rows
from graphtune.data.streaming import StreamingDataset
from graphtune.data.templates import Template
from graphtune.errors import UserError

Tokenizer = PreTrainedTokenizerBase | ProcessorMixin
"""A tokenizer, or the processor of a model that takes images."""

Examples = Dataset | StreamingDataset
Encode = Callable[[Row], Mapping[str, Any]]

ALPACA = "tatsu-lab/alpaca"


class EncodeOptions(RowOptions, total=False):
    """How rows become examples. Every builder takes these.

    max_length: longer examples are cut, in tokens; None (default): never.
    truncate: cut at the `right` (end, default) or the `left` (beginning).
    workers: processes that tokenize; None: as many as there are cores and work for them.
    """

    max_length: int | None
    truncate: Truncate
    workers: int | None


class ChatOptions(EncodeOptions, total=False):
    """How conversations are written and what is learned. Builders of conversations take these.

    train_on: `assistant` (default) for every answer, `last` for the last one, `completion` for
        what follows the last user's turn, `all` for everything.
    template: a name in `graphtune.data.templates`, Jinja text or a `.jinja` file, or a mapping
        of roles to what stands before and after their words; None: the tokenizer's own.
    tools: JSON schemas of tools, shown to the model; a `tools` column of the rows goes first.
    image_dir: folder that relative paths of images start from; None: the working directory.
    """

    train_on: TrainOn
    template: Template | None
    tools: Tools | None
    image_dir: str | Path | None


def instruct(
    tokenizer: Tokenizer,
    *,
    source: Source,
    prompt_column: str = "prompt",
    response_column: str | None = None,
    system_column: str | None = None,
    system: str | None = None,
    **options: Unpack[ChatOptions],
) -> Examples:
    """Prompts and responses (also called prompt and completion), one pair per row.

    Both may be texts or lists of messages; of a prompt that is a list, nothing is learned.

    Args:
        tokenizer: the model's.
        source: files, a folder, a hub id, rows: see `Source`.
        prompt_column: column with the user's words.
        response_column: column with the assistant's, which are learned; None: `completion` or
            `response`, whichever there is.
        system_column: column with system messages.
        system: the system message of rows that have none; None leaves it to the template.
        **options: see `ChatOptions`, `EncodeOptions` and `RowOptions`.

    Raises:
        UserError: an unknown option, a source that cannot be read, a bad row unless they are
            to be skipped, or no examples.
    """
    convert = partial(
        formats.instruct,
        prompt_column=prompt_column,
        response_column=response_column,
        system_column=system_column,
        system=system,
    )
    return _conversations(tokenizer, source, convert, options)


def alpaca(
    tokenizer: Tokenizer,
    *,
    source: Source = ALPACA,
    system: str | None = None,
    **options: Unpack[ChatOptions],
) -> Examples:
    """Rows of `instruction`, `input` (may be empty) and `output`, as in Stanford Alpaca.

    The prompt is the instruction, and the input below it where there is one; with
    `template: alpaca` it is written in the words of that project. Some rows of the default
    source have no output, so that there `on_bad_row` is `skip` unless it is set. Other
    arguments and errors as for `instruct`.
    """
    if source == ALPACA:
        options = {"on_bad_row": "skip", **options}
    return _conversations(tokenizer, source, partial(formats.alpaca, system=system), options)


def chat(
    tokenizer: Tokenizer,
    *,
    source: Source,
    messages_column: str | None = None,
    images_column: str | None = None,
    system: str | None = None,
    **options: Unpack[ChatOptions],
) -> Examples:
    """Conversations of any number of turns, as OpenAI or ShareGPT write them.

    Args:
        tokenizer: the model's, or the processor of a model that takes images.
        source: as for `instruct`.
        messages_column: column with the messages; None: `messages` or `conversations`.
        images_column: column with the images for the messages' image parts or `<image>` tags;
            None: `images` or `image`, if there is one.
        system: a system message in place of those that the conversations have.
        **options: see `ChatOptions`, `EncodeOptions` and `RowOptions`.

    Raises:
        UserError: as for `instruct`.
    """
    convert = partial(
        formats.chat, messages_column=messages_column, images_column=images_column, system=system
    )
    return _conversations(tokenizer, source, convert, options)


def text(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: Source,
    column: str = "text",
    add_eos: bool = True,
    overflow: Literal["split", "cut"] = "split",
    **options: Unpack[EncodeOptions],
) -> Examples:
    """Plain text without a template: every token is learned.

    Args:
        tokenizer: the model's; a token that it puts in front of texts is in front of each row.
        source: as for `instruct`; see `RowOptions` on what a row of a `.txt` file is.
        column: column with the text.
        add_eos: put the end-of-sequence token after each row.
        overflow: what becomes of tokens beyond `max_length`: `split` makes further examples of
            them, `cut` drops them.
        **options: see `EncodeOptions` and `RowOptions`.

    Raises:
        UserError: as for `instruct`; or a tokenizer without an end-of-sequence token.
    """
    _check_options("text", options, EncodeOptions)
    if overflow not in ("split", "cut"):
        raise UserError(f"dataset.overflow: {overflow!r} is unknown; use split or cut")
    if add_eos and tokenizer.eos_token_id is None:
        raise UserError(
            "dataset.add_eos: the tokenizer has no end-of-sequence token; set it to false"
        )
    encode = partial(
        row_encoders.text, tokenizer, column, tokenizer.eos_token_id if add_eos else None
    )
    parts = [tokenizer_key(tokenizer), "text", column, add_eos]
    if overflow == "cut":
        return _encode(source, encode, parts, options)
    length = options.get("max_length")
    whole = _encode(source, encode, parts, {**options, "max_length": None})
    return whole if length is None else whole.in_pieces(length)


def preference(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: Source,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    system: str | None = None,
    **options: Unpack[ChatOptions],
) -> Examples:
    """Pairs of a better and a worse answer to one prompt, for DPO and reward models.

    Rows have a prompt and two answers (texts or lists of messages), or two conversations that
    begin with the same turns. An example has `chosen` and `rejected`, each with the prompt in
    front and labels on the answer alone. Other arguments and errors as for `instruct`.
    """
    convert = partial(
        formats.preference,
        prompt_column=prompt_column,
        chosen_column=chosen_column,
        rejected_column=rejected_column,
        system=system,
    )
    encoder = _encoder(tokenizer, "preference", options)
    encode = partial(row_encoders.pair, encoder, convert)
    return _encode(source, encode, [encoder.key, *_describe(convert)], options)


def unpaired(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: Source,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    label_column: str = "label",
    system: str | None = None,
    **options: Unpack[ChatOptions],
) -> Examples:
    """Answers that are each good or bad by themselves, for KTO.

    An example has labels on the completion alone, and `label`, a bool: whether the row says that
    it is a good one. Other arguments and errors as for `instruct`.
    """
    convert = partial(
        formats.unpaired,
        prompt_column=prompt_column,
        completion_column=completion_column,
        label_column=label_column,
        system=system,
    )
    encoder = _encoder(tokenizer, "unpaired", options)
    encode = partial(row_encoders.judged, encoder, convert)
    return _encode(source, encode, [encoder.key, *_describe(convert)], options)


def stepwise(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: Source,
    prompt_column: str = "prompt",
    steps_column: str = "completions",
    labels_column: str = "labels",
    separator: str = "\n",
    last_step_only: bool = False,
    **options: Unpack[EncodeOptions],
) -> Examples:
    """Solutions whose steps are each right or wrong, for process reward models.

    The prompt and the steps follow one another without a template, each step with `separator`
    after it. The label of the last token of a step's separator is 1 where the step is right
    and 0 where it is wrong, as in TRL; all other labels are -100. Unlike elsewhere, a label is
    about the token that it belongs to: whoever trains on it does not shift.

    Args:
        tokenizer: the model's.
        source: as for `instruct`.
        prompt_column: column with the problem, a text.
        steps_column: column with the steps, a list of texts.
        labels_column: column with a boolean for each step.
        separator: what ends a step.
        last_step_only: label the last step alone.
        **options: see `EncodeOptions` and `RowOptions`.

    Raises:
        UserError: as for `instruct`; or a separator without a token.
    """
    _check_options("stepwise", options, EncodeOptions)
    end = tokenizer.encode(separator, add_special_tokens=False)
    if not end:
        raise UserError(f"dataset.separator: {separator!r} has no token of its own; use another")
    convert = partial(
        formats.stepwise,
        prompt_column=prompt_column,
        steps_column=steps_column,
        labels_column=labels_column,
    )
    encode = partial(row_encoders.steps, tokenizer, convert, end, last_step_only)
    parts = [tokenizer_key(tokenizer), *_describe(convert), separator, last_step_only]
    return _encode(source, encode, parts, options)


def questions(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: Source,
    prompt_column: str = "prompt",
    answer_column: str | None = "answer",
    system: str | None = None,
    **options: Unpack[ChatOptions],
) -> Examples:
    """Prompts that the model answers itself, for GRPO and PPO.

    An example has `prompt_ids`, up to where the assistant begins to speak, and every other
    column of its row, for reward functions. Other arguments and errors as for `instruct`.

    Args:
        tokenizer: the model's.
        source: as for `instruct`.
        prompt_column: column with the question: a text, or messages that end with the user.
        answer_column: column with the answer, which must be there; None: no answers are known.
        system: a system message in front.
        **options: see `ChatOptions`, `EncodeOptions` and `RowOptions`.
    """
    convert = partial(
        formats.question, prompt_column=prompt_column, answer_column=answer_column, system=system
    )
    encoder = _encoder(tokenizer, "questions", options)
    encode = partial(row_encoders.question, encoder, convert)
    return _encode(source, encode, [encoder.key, *_describe(convert)], options)


# What the builders share


def _conversations(
    tokenizer: Tokenizer,
    source: Source,
    convert: Callable[[Row], list[Message]],
    options: ChatOptions,
) -> Examples:
    encoder = _encoder(tokenizer, convert.func.__name__, options)  # type: ignore[attr-defined]
    encode = partial(row_encoders.conversation, encoder, convert)
    return _encode(source, encode, [encoder.key, *_describe(convert)], options)


def _encode(source: Source, encode: Encode, key: list[Any], options: EncodeOptions) -> Examples:
    row_options = {name: options[name] for name in RowOptions.__optional_keys__ if name in options}  # type: ignore[literal-required]
    return encode_rows(
        read_rows(source, **row_options),
        encode,
        key=hashlib.sha256(repr(key).encode()).hexdigest(),
        max_length=options.get("max_length"),
        truncate=options.get("truncate", "right"),
        workers=options.get("workers"),
    )


def _check_options(builder: str, options: Mapping[str, Any], known: Any) -> None:
    for name in options:
        if name not in known.__optional_keys__:
            hint = close_match(name, sorted(known.__optional_keys__))
            raise UserError(f"dataset.{name}: {builder} has no such option; {hint}")


def _encoder(tokenizer: Tokenizer, builder: str, options: ChatOptions) -> Any:
    """What encodes conversations: with the processor's images if there is one."""
    _check_options(builder, options, ChatOptions)
    names = ("template", "train_on", "tools", "image_dir")
    given: dict[str, Any] = {
        name: options[name]  # type: ignore[literal-required]
        for name in names
        if options.get(name) is not None
    }
    if hasattr(tokenizer, "image_processor"):
        from graphtune.data.vision import VisionEncoder  # not for text alone

        return VisionEncoder(cast(ProcessorMixin, tokenizer), **given)
    if given.pop("image_dir", None) is not None:
        raise ImagesFound("dataset.image_dir: the model takes no images; leave it out")
    return ConversationEncoder(cast(PreTrainedTokenizerBase, tokenizer), **given)


def _describe(convert: Callable[..., Any]) -> list[Any]:
    """A format and its arguments, for the key of a cache."""
    assert isinstance(convert, partial)
    return [convert.func.__name__, sorted(convert.keywords.items())]
