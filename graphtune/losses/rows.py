"""Which rows of a batch have a label: a loss that is part of the graph is computed for those."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from graphtune.losses.cross_entropy import (
    IGNORE_INDEX,
    cross_entropy,
    shift_labels,
    shift_weights,
)
from graphtune.models.images import IMAGE_INPUTS

Batch: TypeAlias = Mapping[str, Tensor]
Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Logits, labels, and weights or None -> the loss summed over all labelled tokens."""

ROW_INPUTS = {"rows": torch.int64, "targets": torch.int64, "row_weights": torch.float32}
"""What a program whose loss is part of its graph takes besides, all of one shape."""


def labelled_rows(
    labels: Tensor, weights: Tensor | None = None, *, chunks: int
) -> dict[str, Tensor]:
    """The positions of a batch that predict a labelled token, in chunks of one size.

    Not for what is compiled: how many there are depends on the labels.

    Args:
        labels: int64 (batch, seq), unshifted, -100 where nothing is to be learned.
        weights: float32 (batch, seq), what each label's loss is multiplied by.
        chunks: how many chunks the positions are dealt to.

    Returns:
        `rows` int64 (chunks, n), positions in the flattened batch; `targets` int64 (chunks, n),
        the tokens that follow them; `row_weights` float32 (chunks, n), 0 for what fills up the
        last chunk. n is at least 2, as symbolic sizes have to be.
    """
    targets = shift_labels(labels).flatten()
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    kept = torch.ones_like(rows, dtype=torch.float32)
    if weights is not None:
        kept = shift_weights(weights).flatten()[rows].float()
    size = max(2, -(-rows.numel() // chunks))
    fill = (0, size * chunks - rows.numel())
    parts = {"rows": rows, "targets": targets[rows], "row_weights": kept}
    return {name: F.pad(part, fill).view(chunks, size) for name, part in parts.items()}


def with_rows(program: Any, batch: Batch) -> Batch:
    """A batch with its labelled rows, for a program that computes the loss by itself."""
    if "rows" not in program.inputs:
        return batch
    chunks = int(program.inputs["rows"].shape[0])
    return {**batch, **labelled_rows(batch["labels"], batch.get("weights"), chunks=chunks)}


def loss_sum(program: Any, batch: Batch, loss: Loss = cross_entropy) -> Tensor:
    """Loss summed over a batch's labelled tokens, by the graph or, where it gives logits, by
    `loss`.

    Args:
        program: a `graphtune.Program`.
        batch: `input_ids`, `labels` and what else a training step takes; as
            `graphtune.image_inputs.as_taken` returns it.
    """
    given = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    images = {name: batch[name] for name in IMAGE_INPUTS if name in batch}
    if "rows" in batch:
        return program(*given, **images, **{name: batch[name] for name in ROW_INPUTS})
    return loss(program(*given, **images), batch["labels"], batch.get("weights"))
