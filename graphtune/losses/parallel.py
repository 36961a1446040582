"""Cross entropy whose logits are divided over ranks, by tokens of the vocabulary or of the row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from graphtune import exchange
from graphtune.distributed import current_mesh, group_name
from graphtune.losses.cross_entropy import (
    IGNORE_INDEX,
    cross_entropy,
    shift_labels,
    shift_weights,
)
from graphtune.torch_private import group_rank, group_size


@dataclass(frozen=True)
class _OverRanks:
    """A loss of ranks that are known when it is made: a compiled step cannot look them up."""

    group: str | None = None
    axis: ClassVar[str]
    rank: int = field(init=False, default=0)
    ranks: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        group = self.group or group_name(current_mesh("loss"), self.axis)
        object.__setattr__(self, "group", group)
        object.__setattr__(self, "rank", group_rank(group))
        object.__setattr__(self, "ranks", group_size(group))


@dataclass(frozen=True)
class VocabParallelCrossEntropy(_OverRanks):
    """`cross_entropy` of logits of which each rank has those of its part of the vocabulary.

    Three numbers are exchanged for each token instead of all its logits (Shoeybi et al.,
    Megatron-LM, arXiv:1909.08053, section 3): the largest, the sum of exponentials, and the
    logit of the label. For a program of `TensorParallel(gather_logits=False)`.

    Attributes:
        group: name of the process group of the ranks; None: the axis `tp` of the run's mesh.
        z_loss: as for `cross_entropy`.
    """

    z_loss: float = 0.0
    axis: ClassVar[str] = "tp"

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss summed over all labelled tokens, the same on all ranks, a scalar float32.

        Args:
            logits: (batch, seq, vocab / ranks), any float dtype.
            labels: int64 (batch, seq), unshifted, of the whole vocabulary.
            weights: float32 (batch, seq), or None.
        """
        group = self.group
        local = logits.float()
        largest = exchange.maximum(local.detach().amax(-1), group)
        total = (local - largest.unsqueeze(-1)).exp().sum(-1)
        log_total = exchange.all_reduce(total, group).log() + largest
        targets = shift_labels(labels)
        own = targets - self.rank * local.shape[-1]
        inside = (own >= 0) & (own < local.shape[-1])
        found = local.gather(-1, own.where(inside, 0).unsqueeze(-1)).squeeze(-1)
        of_label = exchange.all_reduce(found.where(inside, 0), group)
        loss = log_total - of_label
        if self.z_loss != 0:
            loss = loss + self.z_loss * log_total.square()
        loss = loss.where(targets != IGNORE_INDEX, 0)
        return loss.sum() if weights is None else (loss * shift_weights(weights)).sum()


@dataclass(frozen=True)
class ContextParallelCrossEntropy(_OverRanks):
    """`cross_entropy` of logits of which each rank has those of its tokens.

    For a program of `ContextParallel`, and labels of whole rows. A training step counts the tokens
    of all ranks, and so each token once for each rank; the loss is multiplied by their number.

    Attributes:
        group: name of the process group of the ranks; None: the axis `cp` of the run's mesh.
        label_smoothing, z_loss: as for `cross_entropy`.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    axis: ClassVar[str] = "cp"

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss summed over this rank's labelled tokens, times the number of ranks.

        Args:
            logits: (batch, this rank's tokens, vocab), any float dtype.
            labels: int64 (batch, seq), unshifted.
            weights: float32 (batch, seq), or None.
        """
        group = self.group
        # The loss shifts what it is given; a column before it makes up for that.
        own = exchange.share_balanced(shift_labels(labels), 1, IGNORE_INDEX, group)
        own = torch.nn.functional.pad(own, (1, 0), value=IGNORE_INDEX)
        if weights is not None:
            weights = exchange.share_balanced(shift_weights(weights), 1, 0, group)
            weights = torch.nn.functional.pad(weights, (1, 0))
        logits = torch.nn.functional.pad(logits, (0, 0, 0, 1))
        loss = cross_entropy(
            logits, own, weights, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )
        return loss * self.ranks
