"""Which rows of a batch have a label: a loss that is part of the graph is computed for those."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from graphtune import exchange
from graphtune.distributed import group_name
from graphtune.losses.cross_entropy import (
    IGNORE_INDEX,
    cross_entropy,
    shift_labels,
    shift_weights,
)
from graphtune.models.images import IMAGE_INPUTS
from graphtune.torch_private import group_size

Batch: TypeAlias = Mapping[str, Tensor]
Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Logits, labels, and weights or None -> the loss summed over all labelled tokens."""

ROW_INPUTS = {"rows": torch.int64, "targets": torch.int64, "row_weights": torch.float32}
"""What a program whose loss is part of its graph takes besides, all of one shape."""


def excerpt(batch: Batch, rows: int = 2, length: int = 64) -> Batch:
    """The rows of a batch that have the most labels, and of those the tokens that have the most.

    Of tokens within a text, what they see before the excerpt is left out. A batch of images stays
    as it is.
    """
    if any(name in batch for name in IMAGE_INPUTS):
        return batch
    labelled = (batch["labels"] != IGNORE_INDEX).int()
    if "weights" in batch:
        labelled *= batch["weights"] != 0
    size, whole = labelled.shape
    length = min(length, whole)
    chosen = labelled.sum(1).topk(min(rows, size)).indices
    start = int(labelled[chosen].unfold(1, length, 1).sum((0, 2)).argmax())

    def cut(value: Tensor) -> Tensor:
        value = value[chosen]
        for dim in range(1, value.dim()):
            if value.shape[dim] == whole:
                value = value.narrow(dim, start, length)
        return value.contiguous()

    return {name: cut(value) for name, value in batch.items()}


def labelled_rows(
    labels: Tensor, weights: Tensor | None = None, *, chunks: int, group: str | None = None
) -> dict[str, Tensor]:
    """The positions of a batch that predict a labelled token, in chunks of one size.

    Not for what is compiled: how many there are depends on the labels.

    Args:
        labels: int64 (batch, seq), unshifted, -100 where nothing is to be learned.
        weights: float32 (batch, seq), what each label's loss is multiplied by.
        chunks: how many chunks the positions are dealt to.
        group: name of the process group over which `ContextParallel` divides each row's tokens;
            positions are then among those of this rank. As a step counts the tokens of all ranks,
            and so each once for each rank, weights are multiplied by their number.

    Returns:
        `rows` int64 (chunks, n), positions in the flattened batch; `targets` int64 (chunks, n),
        the tokens that follow them; `row_weights` float32 (chunks, n), 0 for what fills up the
        last chunk. n is at least 2, as symbolic sizes have to be.
    """
    following = shift_labels(labels)
    given = None if weights is None else shift_weights(weights)
    ranks = 1
    if group is not None:
        ranks = group_size(group)
        following = exchange.share_balanced(following, 1, IGNORE_INDEX, group)
        given = None if given is None else exchange.share_balanced(given, 1, 0, group)
    targets = following.flatten()
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    kept = torch.full_like(rows, ranks, dtype=torch.float32)
    if given is not None:
        kept *= given.flatten()[rows]
    size = max(2, -(-rows.numel() // chunks))
    fill = (0, size * chunks - rows.numel())
    parts = {"rows": rows, "targets": targets[rows], "row_weights": kept}
    return {name: F.pad(part, fill).view(chunks, size) for name, part in parts.items()}


def with_rows(program: Any, batch: Batch) -> Batch:
    """A batch with its labelled rows, for a program that computes the loss by itself."""
    if "rows" not in program.inputs:
        return batch
    chunks = int(program.inputs["rows"].shape[0])
    group = None
    if any(row.name == "context_parallel" for row in program.ledger):
        group = group_name(program.distribution.mesh, "cp")
    labels, weights = batch["labels"], batch.get("weights")
    return {**batch, **labelled_rows(labels, weights, chunks=chunks, group=group)}


def loss_sum(program: Any, batch: Batch, loss: Loss = cross_entropy) -> Tensor:
    """Loss summed over a batch's labelled tokens, by the graph or, where it gives logits, by
    `loss`.

    Args:
        program: a `graphtune.Program`.
        batch: `input_ids`, `labels` and what else a training step takes; as
            `graphtune.image_inputs.as_taken` returns it.
    """
    given = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    added = {name: batch[name] for name in (*IMAGE_INPUTS, "documents") if name in batch}
    if "rows" in batch:
        return program(*given, **added, **{name: batch[name] for name in ROW_INPUTS})
    return loss(program(*given, **added), batch["labels"], batch.get("weights"))
