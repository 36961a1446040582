"""Losses: functions of logits and labels that know nothing of graphs."""

from graphtune.losses.cross_entropy import (
    IGNORE_INDEX,
    cross_entropy,
    labelled_tokens,
    shift_labels,
    shift_weights,
)
from graphtune.losses.parallel import ContextParallelCrossEntropy, VocabParallelCrossEntropy

__all__ = [
    "IGNORE_INDEX",
    "ContextParallelCrossEntropy",
    "VocabParallelCrossEntropy",
    "cross_entropy",
    "labelled_tokens",
    "shift_labels",
    "shift_weights",
]
