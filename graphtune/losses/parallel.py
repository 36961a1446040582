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
    logit of the label; for `label_smoothing` also the sum of all. For a program of
    `TensorParallel(gather_logits=False)`.

    Attributes:
        group: name of the process group of the ranks; None: the axis `tp` of the run's mesh.
        label_smoothing, z_loss: as for `cross_entropy`.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    axis: ClassVar[str] = "tp"

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss summed over all labelled tokens, the same on all ranks, a scalar float32.

        Args:
            logits: (batch, seq, vocab / ranks), any float dtype.
            labels: int64 (batch, seq), unshifted, of the whole vocabulary.
            weights: float32 (batch, seq), or None.
        """
        targets = shift_labels(labels).flatten()
        loss, _ = self.of_tokens(logits.flatten(0, 1), targets)
        loss = loss.where(targets != IGNORE_INDEX, 0)
        return loss.sum() if weights is None else (loss * shift_weights(weights).flatten()).sum()

    def of_tokens(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`token_cross_entropy`, and the logs of the softmax's denominators, both float32 (n,).

        Args:
            logits: (n, vocab / ranks), any float dtype.
            targets: int64 (n,), of the whole vocabulary.
        """
        local = logits.float()
        largest = exchange.maximum(local.detach().amax(-1), self.group)
        own, inside = self._own(targets, local.shape[-1])
        aimed = local.gather(-1, own.unsqueeze(-1)).squeeze(-1).where(inside, 0)
        sums = [(local - largest.unsqueeze(-1)).exp().sum(-1), aimed]
        if self.label_smoothing:
            sums.append(local.sum(-1))
        total, aimed, *rest = exchange.all_reduce(torch.stack(sums), self.group).unbind()
        if rest:
            mean = rest[0] / (local.shape[-1] * self.ranks)
            aimed = (1 - self.label_smoothing) * aimed + self.label_smoothing * mean
        log_denominator = total.log() + largest
        loss = log_denominator - aimed
        if self.z_loss:
            loss = loss + self.z_loss * log_denominator.square()
        return loss, log_denominator

    def slope(
        self, logits: Tensor, targets: Tensor, weights: Tensor, log_denominator: Tensor
    ) -> Tensor:
        """Gradient of `(loss * weights).sum()` with respect to this rank's logits, as they are.

        Args:
            logits, targets: as of `of_tokens`.
            weights: float32 (n,).
            log_denominator: what `of_tokens` returned.
        """
        vocab = logits.shape[-1]
        scale = weights * (1 + 2 * self.z_loss * log_denominator) if self.z_loss else weights
        slope = (logits.float() - log_denominator[:, None]).exp_().mul_(scale[:, None])
        if self.label_smoothing:
            slope.sub_(weights[:, None] * (self.label_smoothing / (vocab * self.ranks)))
        own, inside = self._own(targets, vocab)
        aimed = (weights * (self.label_smoothing - 1)).where(inside, 0)
        return slope.scatter_add_(1, own[:, None], aimed[:, None]).to(logits.dtype)

    def _own(self, targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
        """Targets counted from this rank's first token, 0 for another's, and which are its own."""
        own = targets - self.rank * vocab
        inside = (own >= 0) & (own < vocab)
        return own.where(inside, 0), inside


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
