"""Rows of different lengths -> one batch of tensors that says who may attend to whom."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphtune.data.dataset import IGNORE_INDEX, Example
from graphtune.data.packing import Pack, concatenate
from graphtune.errors import UserError

_NO_DOCUMENT = -1


Batch = dict[str, torch.Tensor]
"""What a training step takes.

input_ids: int64 (batch, seq).
labels: int64 (batch, seq), unshifted; -100 is left out of the loss.
position_ids: int64 (batch, seq), from 0 in each document.
attention_mask: bool (batch, 1, seq, seq), True where a query (row) sees a key (column): the same
    document, not later. Padding sees itself alone, as a row without any key would give NaN.
"""


def collate(
    examples: Sequence[Example], *, length: int | None = None, pad_token_id: int = 0
) -> Batch:
    """One example per row, padded at the end to `length` (None: to the longest example).

    Raises:
        UserError: an example is longer than `length`.
    """
    if length is None:
        length = max(len(example["input_ids"]) for example in examples)
    return collate_packed([concatenate([example]) for example in examples], length, pad_token_id)


def collate_packed(packs: Sequence[Pack], length: int, pad_token_id: int = 0) -> Batch:
    """One pack per row, padded at the end to `length`; an empty pack is a row of padding.

    Raises:
        UserError: a pack is longer than `length`.
    """
    longest = max(len(row["input_ids"]) for row in packs)
    if longest > length:
        raise UserError(
            f"dataset.max_length: a row has {longest} tokens, but a batch holds {length}; "
            f"set it to {length} or less"
        )

    def stack(rows: list[list[int]], padding: int) -> torch.Tensor:
        return torch.tensor([row + [padding] * (length - len(row)) for row in rows])

    documents = stack([row["document_ids"] for row in packs], _NO_DOCUMENT)
    return Batch(
        input_ids=stack([row["input_ids"] for row in packs], pad_token_id),
        labels=stack([row["labels"] for row in packs], IGNORE_INDEX),
        position_ids=stack([row["position_ids"] for row in packs], 0),
        attention_mask=document_mask(documents),
    )


def count_tokens(batch: Batch) -> int:
    """Tokens of the batch that are not padding.

    Positions count up from 0 in each document, which has at least two tokens, and are 0 in
    padding; so that every 1 stands for one document's uncounted first token.
    """
    positions = batch["position_ids"]
    return int((positions > 0).sum() + (positions == 1).sum())


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """Causal attention within each document.

    Args:
        documents: int64 (batch, seq), the number of the document that a token belongs to;
            negative for padding.

    Returns:
        bool (batch, 1, seq, seq), True = attend.
    """
    seq = documents.shape[1]
    same = documents[:, :, None] == documents[:, None, :]
    real = (documents >= 0)[:, None, :]
    itself = torch.eye(seq, dtype=torch.bool)
    return ((same & real).tril() | itself)[:, None]
