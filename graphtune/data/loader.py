"""Batches of one fixed shape, in an order that a seed and the epoch decide."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from graphtune.data.collation import Batch, collate_packed
from graphtune.data.dataset import Example
from graphtune.data.packing import Pack, concatenate, pack


def batches(
    dataset: Sequence[Example],
    *,
    batch_size: int,
    length: int,
    packed: bool = False,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    pad_token_id: int = 0,
) -> Iterator[Batch]:
    """One epoch of `dataset` as batches of shape (batch_size, length).

    The shape never changes, so a compiled step compiles once: what is missing in the last batch
    is padding, which has no labels. The order is a function of `seed` and `epoch` alone.

    Args:
        dataset: examples of at most `length` tokens.
        batch_size: rows per batch.
        length: tokens per row.
        packed: several documents per row, kept apart by the attention mask; else one.
        seed, epoch: decide the order, if `shuffle`.
        pad_token_id: any id of the vocabulary; padding is masked.

    Raises:
        UserError: an example is longer than `length`.
    """
    rows = _rows(dataset, length, packed)
    if shuffle:
        random.Random(f"{seed}:{epoch}").shuffle(rows)
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        missing = [concatenate([])] * (batch_size - len(chosen))
        yield collate_packed(chosen + missing, length, pad_token_id)


def count_batches(
    dataset: Sequence[Example], *, batch_size: int, length: int, packed: bool = False
) -> int:
    """How many batches one epoch has; arguments as for `batches`."""
    return -(-len(_rows(dataset, length, packed)) // batch_size)


def _rows(dataset: Sequence[Example], length: int, packed: bool) -> list[Pack]:
    return pack(dataset, length) if packed else [concatenate([example]) for example in dataset]
