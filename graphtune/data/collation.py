"""Rows of examples -> one batch of tensors that says who may attend to whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphtune.data.dataset import IGNORE_INDEX
from graphtune.errors import UserError

Batch = dict[str, torch.Tensor]
"""What a training step takes.

input_ids: int64 (batch, seq).
labels: int64 (batch, seq), unshifted; -100 is left out of the loss. The first label of each
    document is -100: the token before it belongs to another.
position_ids: int64 (batch, seq), from 0 in each document.
attention_mask: bool (batch, 1, seq, seq), True where a query (row) sees a key (column): the same
    document, not later. Padding sees itself alone, as a row without any key would give NaN.

Where an example of the batch has `weights`:
weights: float32 (batch, seq), how much each token's label counts; 1 where an example has none,
    0 in padding.

With pairs, and with examples that have a `label` (a loss sums log-probabilities by document):
document_ids: int64 (batch, seq), the document of each token, numbered from 0 through the whole
    batch; -1 in padding. Pair k has the documents 2k, chosen, and 2k + 1, rejected.
document_labels: int64 (batch, seq), with `label` only: 1 where the token's document is wanted,
    0 where it is not, -1 in padding.

With images: what the model takes besides; see `vision.collate_images`. What speaks of tokens
    is (batch, seq, ...); the rest has the images of all documents along its first dimension, in
    the order in which rows hold their documents.
"""

Document = Mapping[str, Any]
"""An `Example`; with unpaired preferences also `label`, a bool: whether the answer is wanted."""

_NO_DOCUMENT = -1


def collate(
    examples: Sequence[Document], *, length: int | None = None, pad_token_id: int = 0
) -> Batch:
    """One example per row, padded at the end to `length` (None: to the longest example).

    Raises:
        UserError: an example is longer than `length`.
    """
    if length is None:
        length = max(len(example["input_ids"]) for example in examples)
    return collate_packed([[example] for example in examples], length, pad_token_id)


def collate_packed(rows: Sequence[Sequence[Document]], length: int, pad_token_id: int = 0) -> Batch:
    """Several examples per row, laid end to end and padded to `length`; an empty row is padding.

    Raises:
        UserError: the examples of a row are together longer than `length`.
    """
    return complete(lay_out(rows, length, pad_token_id))


def lay_out(
    rows: Sequence[Sequence[Document]],
    length: int,
    pad_token_id: int = 0,
    *,
    number_documents: bool = False,
) -> Batch:
    """All of a batch but the attention mask, which is by far the largest part and follows from
    `position_ids`; see `complete`.

    Args:
        rows: the examples of each row.
        length: tokens per row.
        pad_token_id: any id of the vocabulary; padding is masked.
        number_documents: add `document_ids`, and `document_labels` where there are labels.

    Raises:
        UserError: the examples of a row are together longer than `length`.
    """
    spans = _spans(rows, length)

    def column(padding: float, dtype: type[np.generic] = np.int64) -> NDArray[Any]:
        return np.full((len(rows), length), padding, dtype)

    columns = {
        "input_ids": column(pad_token_id),
        "labels": column(IGNORE_INDEX),
        "position_ids": column(0),
    }
    if any("weights" in document for _, _, document in spans):
        columns["weights"] = column(0, np.float32)
    if number_documents:
        columns["document_ids"] = column(_NO_DOCUMENT)
        if any("label" in document for _, _, document in spans):
            columns["document_labels"] = column(_NO_DOCUMENT)

    count = np.arange(length)
    for number, (row, start, document) in enumerate(spans):
        size = len(document["input_ids"])
        end = start + size
        columns["input_ids"][row, start:end] = document["input_ids"]
        columns["labels"][row, start + 1 : end] = document["labels"][1:]
        columns["position_ids"][row, start:end] = count[:size]
        if "weights" in columns:
            columns["weights"][row, start:end] = document.get("weights", 1.0)
        if "document_ids" in columns:
            columns["document_ids"][row, start:end] = number
        if "document_labels" in columns:
            columns["document_labels"][row, start:end] = document["label"]
    batch = {name: torch.from_numpy(values) for name, values in columns.items()}
    if any("images" in document for _, _, document in spans):
        from graphtune.data.vision import collate_images  # which loads an image library

        batch |= collate_images(rows, length)  # type: ignore[arg-type]  # Mappings will do
    return batch


def complete(
    batch: dict[str, Any], device: torch.device | str = "cpu", *, masked: bool = True
) -> dict[str, Any]:
    """The batch on `device`, with its `attention_mask`, which is made there, if `masked`."""
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    if masked and "position_ids" in batch:
        batch["attention_mask"] = attention_mask(batch["position_ids"])
    return batch


def attention_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """Causal attention within each document.

    Args:
        position_ids: int64 (batch, seq), from 0 in each document, 0 in padding.

    Returns:
        bool (batch, 1, seq, seq), True = attend; on the same device.
    """
    if position_ids.device.type == "cpu":
        return _mask_by_blocks(position_ids)
    return _mask_by_distance(position_ids)


def _mask_by_distance(position_ids: torch.Tensor) -> torch.Tensor:
    """A query sees as many keys before it as its position says."""
    place = torch.arange(position_ids.shape[1], device=position_ids.device)
    distance = place[:, None] - place
    distance = distance.masked_fill(distance < 0, len(place))  # what comes later is out of reach
    return (distance <= position_ids[:, :, None])[:, None]


def _mask_by_blocks(position_ids: torch.Tensor) -> torch.Tensor:
    """The same, several times faster on a CPU: only what is True is written."""
    positions = position_ids.numpy()
    rows, length = positions.shape
    mask = np.zeros((rows, 1, length, length), np.bool_)
    itself = np.arange(length)
    mask[:, :, itself, itself] = True
    causal = _causal(length)
    for row, one in enumerate(positions):
        starts = np.flatnonzero(one == 1) - 1
        ends = np.flatnonzero((one > 0) & (np.append(one[1:], 0) == 0)) + 1
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            mask[row, 0, start:end, start:end] = causal[: end - start, : end - start]
    return torch.from_numpy(mask)


def collate_questions(
    examples: Sequence[Mapping[str, Any]], *, length: int | None = None, pad_token_id: int = 0
) -> dict[str, Any]:
    """Prompts to be answered by generation, padded in front so that all end at the same place.

    Args:
        examples: `prompt_ids`, token ids, and whatever else a reward needs.
        length: columns; None: as the longest prompt.
        pad_token_id: any id of the vocabulary; `prompt_mask` tells it apart.

    Returns:
        `prompt_ids` int64 (batch, length); `prompt_mask` bool (batch, length), False in padding;
        every other column as a list.

    Raises:
        UserError: a prompt is longer than `length`.
    """
    longest = max(len(example["prompt_ids"]) for example in examples)
    if length is None:
        length = longest
    _check_fits(longest, length)
    ids = np.full((len(examples), length), pad_token_id, np.int64)
    mask = np.zeros((len(examples), length), np.bool_)
    for row, example in enumerate(examples):
        start = length - len(example["prompt_ids"])
        ids[row, start:] = example["prompt_ids"]
        mask[row, start:] = True
    others = {key: [example.get(key) for example in examples] for key in examples[0]}
    return others | {"prompt_ids": torch.from_numpy(ids), "prompt_mask": torch.from_numpy(mask)}


def collate_examples(
    rows: Sequence[Sequence[Mapping[str, Any]]],
    height: int,
    length: int,
    pad_token_id: int = 0,
    *,
    one_per_row: bool = False,
) -> dict[str, Any]:
    """The rows of a plan as tensors, whatever kind of examples they hold; not yet `complete`.

    Args:
        rows: the examples of each row, at least one, all of one kind: documents, pairs
            (`chosen` and `rejected`, an example each) or questions (`prompt_ids`).
        height: rows of the batch. The ones that `rows` lacks are padding; questions are asked
            again instead.
        length: tokens per row.
        one_per_row: a pair's answers get two rows beside each other, so that there are twice
            `height`; else they follow each other in their row.

    Raises:
        UserError: a row is longer than `length`; or questions that are not one per row.
    """
    first = rows[0][0]
    if "prompt_ids" in first:
        if not one_per_row:
            raise UserError("loader.mode: questions cannot be packed; use padded or bucketed")
        questions = islice(cycle(question for row in rows for question in row), height)
        return collate_questions(list(questions), length=length, pad_token_id=pad_token_id)
    pairs = "chosen" in first
    if pairs:
        names = ("chosen", "rejected")
        answers = [[pair[name] for pair in row for name in names] for row in rows]
        rows = [[one] for row in answers for one in row] if one_per_row else answers
        height = 2 * height if one_per_row else height
    rows = [*rows, *[[]] * (height - len(rows))]
    numbered = pairs or "label" in first
    return lay_out(rows, length, pad_token_id, number_documents=numbered)


def without_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with nothing to learn from, but the same keys and shapes: for a rank that has no
    batch left while others have."""
    unlearned = {"labels": IGNORE_INDEX, "document_ids": -1, "document_labels": -1}
    return batch | {
        name: torch.full_like(batch[name], value)
        for name, value in unlearned.items()
        if name in batch
    }


def count_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Tokens of the batch that are not padding.

    Positions count up from 0 in each document, which has at least two tokens, and are 0 in
    padding; so that every 1 stands for one document's uncounted first token.
    """
    positions = batch["position_ids"]
    return int((positions > 0).sum() + (positions == 1).sum())


def _spans(rows: Sequence[Sequence[Document]], length: int) -> list[tuple[int, int, Document]]:
    """Row and first column of each document."""
    spans = []
    for row, documents in enumerate(rows):
        start = 0
        for document in documents:
            spans.append((row, start, document))
            start += len(document["input_ids"])
        _check_fits(start, length)
    return spans


def _check_fits(tokens: int, length: int) -> None:
    if tokens > length:
        raise UserError(
            f"dataset.max_length: a row has {tokens} tokens, but a batch holds {length}; "
            f"set it to {length} or less"
        )


@lru_cache(maxsize=1)
def _causal(length: int) -> NDArray[np.bool_]:
    return np.tri(length, dtype=np.bool_)
