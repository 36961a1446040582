"""Losses: functions of logits and labels that know nothing of graphs."""

from graphtune.losses.cross_entropy import (
    IGNORE_INDEX,
    cross_entropy,
    labelled_tokens,
    shift_labels,
    shift_weights,
    token_cross_entropy,
    token_cross_entropy_slope,
)
from graphtune.losses.parallel import ContextParallelCrossEntropy, VocabParallelCrossEntropy
from graphtune.losses.rows import (
    ROW_INPUTS,
    Batch,
    Loss,
    excerpt,
    labelled_rows,
    loss_sum,
    with_rows,
)

__all__ = [
    "IGNORE_INDEX",
    "ROW_INPUTS",
    "Batch",
    "ContextParallelCrossEntropy",
    "Loss",
    "VocabParallelCrossEntropy",
    "cross_entropy",
    "excerpt",
    "labelled_rows",
    "labelled_tokens",
    "loss_sum",
    "shift_labels",
    "shift_weights",
    "token_cross_entropy",
    "token_cross_entropy_slope",
    "with_rows",
]
