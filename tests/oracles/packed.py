"""Batches whose rows hold several texts."""

from collections.abc import Sequence

from torch import Tensor

from graphtune.data.collation import attention_mask, lay_out
from tests.oracles.models import random_ids


def packed(rows: Sequence[Sequence[int]], length: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch without a mask, of texts of so many random tokens; what is left is padding."""
    drawn = iter(random_ids(1, sum(map(sum, rows)), seed)[0].tolist())

    def text(size: int) -> dict[str, list[int]]:
        ids = [next(drawn) for _ in range(size)]
        return {"input_ids": ids, "labels": ids}

    return lay_out([[text(size) for size in row] for row in rows], length)


def masked(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the mask that its positions stand for."""
    return batch | {"attention_mask": attention_mask(batch["position_ids"])}
