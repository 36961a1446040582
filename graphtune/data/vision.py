"""Conversations with images -> token ids, labels and what the model's vision part takes."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch.nn.functional import pad
from transformers import BatchFeature, ProcessorMixin

from graphtune.data.conversations import ConversationEncoder, Tools, TrainOn
from graphtune.data.dataset import IGNORE_INDEX, Example
from graphtune.data.fields import BadRow
from graphtune.data.images import open_image, split_images
from graphtune.data.messages import Conversation
from graphtune.data.rendering import Refused, Span
from graphtune.data.templates import Template, chat_template
from graphtune.errors import UserError

Tensors = dict[str, torch.Tensor]

_VERSION = "1"  # of what VisionEncoder makes; a change invalidates caches
_TEXT = ("input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets")
_BY_TOKEN = ("mm_token_type_ids", "token_type_ids", "cross_attention_mask")

# In front of a template, it makes parts of contents that are strings, which the templates of
# some vision-language models pass over without a word. The newline keeps the beginning of the
# template the beginning of a line.
_IN_PARTS = """\
{%- set parts = namespace(messages=[]) -%}
{%- for m in messages -%}
{%- if m.content is string and m.role != 'tool' -%}
{%- set m = dict(m, content=[{'type': 'text', 'text': m.content}]) -%}
{%- endif -%}
{%- set parts.messages = parts.messages + [m] -%}
{%- endfor -%}
{%- set messages = parts.messages %}
"""


@dataclass(frozen=True)
class ImageInputs:
    """A model's inputs for the images of one conversation, by how conversations share a batch.

    All are named as the model's arguments. Without images they are empty, but not missing.

    Attributes:
        tokens: (tokens, ...), says something of each token (`mm_token_type_ids`), or of each
            token and image, (tokens, images, ...) (`cross_attention_mask`).
        rows: (images, ...). Each row of a batch has its images to itself, padded to equal
            numbers: `pixel_values` of Idefics 3, (images, channels, height, width).
        flat: (n, ...). The images, tiles or patches of all rows follow each other:
            `pixel_values` of Qwen 2 VL, (patches, values).
    """

    tokens: Tensors
    rows: Tensors
    flat: Tensors


class VisionEncoder(ConversationEncoder):
    """Encodes conversations whose messages hold images with the model's HF processor.

    The ids are those of the processor's own `apply_chat_template`, except where a token would
    reach across the edge of a learned turn: there the text is cut, as generation does. Labels
    are those of `ConversationEncoder`; what stands for an image never has one.

    Args:
        processor: any of transformers' that take images and text, with a fast tokenizer.
        template: a chat template that takes images; None: the processor's own.
        train_on, tools: as for `ConversationEncoder`.
        image_dir: folder that relative paths of images start from; None: the working directory.

    Raises:
        UserError: a processor or a template that does not take images, or no fast tokenizer.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        template: Template | None = None,
        train_on: TrainOn = "assistant",
        tools: Tools | None = None,
        image_dir: str | Path | None = None,
    ) -> None:
        kind = type(processor).__name__
        if not hasattr(processor, "image_processor"):
            raise UserError(f"model.id: {kind} takes no images; use a vision-language model")
        if not getattr(processor.tokenizer, "is_fast", False):
            raise UserError(f"model.id: {kind} must have a fast tokenizer (tokenizer.json)")
        self.processor = processor
        self.image_dir = image_dir
        own = processor.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        text = chat_template(own if template is None else template, processor.tokenizer)
        template = text if text.startswith(_IN_PARTS) else _IN_PARTS + text
        super().__init__(processor.tokenizer, template=template, train_on=train_on, tools=tools)
        self._layout = self._find_layout()

    @cached_property
    def key(self) -> str:
        """Names all that decides the output, for caches. An image that changes under the same
        path or URL is not noticed."""
        parts = (_VERSION, super().key, self.processor.to_json_string(), str(self.image_dir))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def __call__(self, messages: Conversation, tools: Tools | None = None) -> Example:
        """Encode one whole conversation; `images` of the example are `ImageInputs`.

        Raises:
            BadRow: malformed messages, an image that does not open, or text that contains the
                model's placeholder for an image.
        """
        messages, references = split_images(messages)
        images = [open_image(item, image_dir=self.image_dir, field=at) for at, item in references]
        rendered, turns, weights = self._learned_turns(messages, tools)
        inputs = self._process(rendered, images)
        text, moved = _expand(rendered, inputs.get("text_replacement_offsets"))
        turns = [Span(turn.message, *_move(turn[1:], moved)) for turn in turns]
        pictures = [
            Span(-1, *new)
            for _, new in moved
            if any(turn.start < new[1] and new[0] < turn.end for turn in turns)
        ]
        processed: list[int] = inputs["input_ids"][0]
        ids, spans = self._tokens(text, [*turns, *pictures], processed)
        example = self._label(ids, spans[: len(turns)], weights)
        placeholders = {i for i, id in enumerate(ids) if id in self._image_ids}
        placeholders.update(i for span in spans[len(turns) :] for i in range(*span[1:]))
        example["labels"] = _blank(example["labels"], placeholders, IGNORE_INDEX)
        if "weights" in example:
            example["weights"] = _blank(example["weights"], placeholders, 0.0)
        example["images"] = cast(Any, self._sort(_tensors(inputs), self._places(ids, processed)))
        return example

    def _process(self, text: str, images: Sequence[Image.Image]) -> BatchFeature:
        """The processor's output for one conversation, its text in lists, its images in tensors."""
        bos = self.tokenizer.bos_token
        # As in `apply_chat_template`: a template that writes BOS must not get a second one.
        special = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        try:
            return self.processor(
                text=[text],
                images=[list(images)] if images else None,
                return_text_replacement_offsets=True,
                images_kwargs={"return_tensors": "pt"},
                **special,
            )
        except ValueError as error:
            raise BadRow("messages", f"the model's processor refuses them: {error}") from error

    def _tokens(
        self, text: str, spans: list[Span], processed: list[int]
    ) -> tuple[list[int], list[Span]]:
        """Ids of the expanded text, and `spans` in tokens.

        Args:
            processed: the ids that the processor made of the same text.
        """
        ids, spans = self._tokenize(text, spans)
        if ids == processed:
            return ids, spans
        plain = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        extra = len(processed) - len(plain)  # what the tokenizer adds: BOS in front, EOS behind
        head = next((i for i in range(extra + 1) if processed[i:][: len(plain)] == plain), None)
        if head is None:
            raise UserError(
                f"model.id: {type(self.processor).__name__} changes the text of a conversation "
                "beyond its images, so that its turns cannot be found; use a template that "
                "writes all of it"
            )
        ids = [*processed[:head], *ids, *processed[head + len(plain) :]]
        return ids, [Span(message, start + head, end + head) for message, start, end in spans]

    def _places(self, ids: list[int], processed: list[int]) -> list[int]:
        """For each of `ids`, a token of `processed` that the processor says the same of: the same
        placeholder, or the first token of the text between the same two."""
        if ids == processed:
            return list(range(len(ids)))
        images = [i for i, id in enumerate(processed) if id in self._image_ids]
        places, seen = [], 0
        for id in ids:
            if id in self._image_ids:
                seen += 1
                places.append(images[seen - 1])
            else:
                places.append(images[seen - 1] + 1 if seen else 0)
        return places

    def _sort(self, tensors: Tensors, places: list[int]) -> ImageInputs:
        """The model's inputs by how they share a batch; `places` as of `_places`."""
        inputs = ImageInputs({}, {}, {})
        for name, (kind, empty) in self._layout.items():
            tensor = tensors.get(name)
            if kind == "tokens":
                missing = empty.new_zeros(len(places), *empty.shape[1:])
                inputs.tokens[name] = missing if tensor is None else tensor[0, places]
            elif kind == "rows":
                inputs.rows[name] = empty if tensor is None else tensor[0]
            else:
                inputs.flat[name] = empty if tensor is None else tensor
        return inputs

    def _find_layout(self) -> dict[str, tuple[str, torch.Tensor]]:
        """Of each input, how it shares a batch, and what a conversation without images has.

        Two images tell: if the first dimension is 1, it counts conversations.
        """
        self._image_ids = set(self.processor.image_token_ids)
        parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
        try:
            text, _ = self.renderer.render([{"role": "user", "content": parts}], self.tools)
            inputs = self._process(text, [Image.new("RGB", (64, 64), "gray")] * 2)
        except (BadRow, Refused) as error:
            raise UserError(
                f"dataset.template: the chat template does not write images as "
                f"{type(self.processor).__name__} reads them ({error})"
            ) from error
        layout = {}
        for name, tensor in _tensors(inputs).items():
            by_row = len(tensor) == 1 and tensor.dim() > 1  # else a number for each conversation
            kind = "tokens" if name in _BY_TOKEN else "rows" if by_row else "flat"
            shape = tensor.shape if kind == "flat" else tensor.shape[1:]
            layout[name] = kind, tensor.new_zeros([0 for _ in shape])
        return layout


def collate_images(rows: Sequence[Sequence[Example]], length: int) -> Tensors:
    """What a batch holds besides ids, labels and masks, for models that take images.

    What is smaller than its like in other rows is filled up with zeros: to models, a zero in a
    mask is padding, and an image of zeros is none.

    Args:
        rows: the documents that lie end to end in each row, from one `VisionEncoder`. Rows may
            be empty, and documents may be without `images`.
        length: tokens per row.

    Returns:
        Tensors by the names of the model's arguments (see `ImageInputs`): of `tokens`
        (rows, length, ...), of `rows` (rows, images, ...), of `flat` (n, ...). Without an image
        in the whole batch there are only those of tokens.
    """
    found = [[_inputs(document) for document in row if "images" in document] for row in rows]
    every = [inputs for row in found for inputs in row]
    if not every:
        return {}
    batch: Tensors = {}
    for name in every[0].flat:
        batch[name] = _concatenate([inputs.flat[name] for inputs in every])
    for name, tensor in every[0].rows.items():
        stacks = [_concatenate([one.rows[name] for one in row], like=tensor) for row in found]
        batch[name] = _concatenate([stack[None] for stack in stacks])
    batch = {name: tensor for name, tensor in batch.items() if tensor.numel()}
    for name, tensor in every[0].tokens.items():
        laid = [_lay_tokens(row, name, length, like=tensor) for row in rows]
        batch[name] = _concatenate([one[None] for one in laid])
    return batch


def _lay_tokens(
    row: Sequence[Example], name: str, length: int, *, like: torch.Tensor
) -> torch.Tensor:
    """(length, ...), what documents say of their tokens and images, each in its own place."""
    start, images, pieces = 0, 0, []
    for document in row:
        if "images" in document:
            tensor = _inputs(document).tokens[name]
            before = [start, images, *[0] * tensor.dim()][: tensor.dim()]
            if tensor.dim() > 1:
                images += tensor.shape[1]
            pieces.append(pad(tensor, [side for size in reversed(before) for side in (size, 0)]))
        start += len(document["input_ids"])
    if not pieces:
        return like.new_zeros([length, *(0 for _ in like.shape[1:])])
    sizes = [length, *(max(sizes) for sizes in zip(*(p.shape[1:] for p in pieces), strict=True))]
    return torch.stack([_fill(piece, sizes) for piece in pieces]).sum(0, dtype=like.dtype)


def _concatenate(
    tensors: Sequence[torch.Tensor], *, like: torch.Tensor | None = None
) -> torch.Tensor:
    """Along dimension 0; the others filled up to the largest. None give an empty one as `like`."""
    if not tensors:
        assert like is not None
        return like.new_zeros([0 for _ in like.shape])
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return torch.cat([_fill(tensor, [len(tensor), *sizes]) for tensor in tensors])


def _fill(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Zeros at the end of each dimension, up to `sizes`."""
    missing = [size - have for size, have in zip(sizes, tensor.shape, strict=True)]
    return pad(tensor, [side for count in reversed(missing) for side in (0, count)])


def _blank(values: Any, places: set[int], value: float) -> list[Any]:
    return [value if i in places else one for i, one in enumerate(values)]


def _inputs(example: Example) -> ImageInputs:
    return cast(Any, example["images"])


def _tensors(inputs: Mapping[str, Any]) -> Tensors:
    return {name: torch.as_tensor(value) for name, value in inputs.items() if name not in _TEXT}


class _Moved(NamedTuple):
    """Where an image's placeholder was in the rendered text, and is in the expanded one."""

    old: tuple[int, int]
    new: tuple[int, int]


def _expand(text: str, replacements: Any) -> tuple[str, list[_Moved]]:
    """The text with images as the processor writes them, and where they are."""
    pieces, last, moved = [], 0, []
    for one in replacements[0] if replacements else ():
        (start, end), new = one["span"], tuple(one["new_span"])
        pieces += [text[last:start], one["replacement"]]
        moved.append(_Moved((start, end), new))
        last = end
    return "".join([*pieces, text[last:]]), moved


def _move(span: Sequence[int], moved: Sequence[_Moved]) -> tuple[int, int]:
    """Where `span` of the rendered text lies once the images before and in it are expanded."""
    ends = [old[1] for old, _ in moved]
    gained = [0, *(new[1] - old[1] for old, new in moved)]
    start, end = (at + gained[bisect_right(ends, at)] for at in span)
    return start, end
