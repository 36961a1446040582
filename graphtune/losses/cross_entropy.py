"""Next-token cross entropy, with the one place where labels are shifted."""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token that the loss leaves out, as in torch and transformers."""


def shift_labels(labels: Tensor) -> Tensor:
    """Labels (batch, seq) moved so that position i holds the token that follows it.

    Labels are unshifted everywhere else, as in `transformers`. The last position has nothing to
    predict and is ignored.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def shift_weights(weights: Tensor) -> Tensor:
    """Weights (batch, seq) of labels, moved as `shift_labels` moves the labels."""
    return F.pad(weights[:, 1:], (0, 1))


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum of the next-token cross entropy over all labelled tokens, in nats.

    A sum, not a mean, so that micro-batches and ranks add up to one large batch: divide by
    `labelled_tokens` of all of them.

    Args:
        logits: (batch, seq, vocab), any float dtype; computed in float32.
        labels: int64 (batch, seq), unshifted, -100 where nothing is to be learned.
        weights: float32 (batch, seq), what each label's loss is multiplied by.
        label_smoothing: part of each target that is spread over the whole vocabulary, in [0, 1]
            (Szegedy et al., arXiv:1512.00567).
        z_loss: times the squared log of the softmax's denominator is added to each label's loss,
            which keeps logits from drifting (Chowdhery et al., arXiv:2204.02311, with 1e-4).

    Returns:
        Scalar float32.
    """
    flat = logits.float().flatten(0, 1)
    targets = shift_labels(labels).flatten()
    plain = weights is None and z_loss == 0
    loss = F.cross_entropy(
        flat,
        targets,
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
        reduction="sum" if plain else "none",
    )
    if z_loss != 0:
        squares = flat.logsumexp(-1).square()
        loss = loss + z_loss * squares.where(targets != IGNORE_INDEX, 0)
    if weights is not None:
        loss = loss * shift_weights(weights).flatten()
    return loss.sum()


def labelled_tokens(labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """What the loss is divided by: the number of tokens that it sums over, a scalar int64; or
    the sum of their weights, a scalar float32."""
    labelled = labels[:, 1:] != IGNORE_INDEX
    return labelled.sum() if weights is None else (labelled * weights[:, 1:]).sum()


def token_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Cross entropy of each row by itself, float32 (n,), in nats.

    Args:
        logits: (n, vocab), any float dtype; computed in float32.
        targets: int64 (n,), the token that each row is to predict; none is ignored.
        label_smoothing, z_loss: as of `cross_entropy`.
    """
    logits = logits.float()
    log_denominator = logits.logsumexp(-1)
    aimed = logits.gather(1, targets[:, None]).squeeze(1)
    if label_smoothing:
        aimed = (1 - label_smoothing) * aimed + label_smoothing * logits.mean(-1)
    loss = log_denominator - aimed
    return loss + z_loss * log_denominator.square() if z_loss else loss


def token_cross_entropy_slope(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Gradient of `(token_cross_entropy(...) * weights).sum()` with respect to the logits.

    Args:
        logits, targets, label_smoothing, z_loss: as of `token_cross_entropy`.
        weights: float32 (n,).

    Returns:
        (n, vocab), in the dtype of the logits.
    """
    dtype, vocab = logits.dtype, logits.shape[-1]
    logits = logits.float()
    log_denominator = logits.logsumexp(-1)
    scale = weights * (1 + 2 * z_loss * log_denominator) if z_loss else weights
    slope = (logits - log_denominator[:, None]).exp_().mul_(scale[:, None])
    if label_smoothing:
        slope.sub_(weights[:, None] * (label_smoothing / vocab))
    slope.scatter_add_(1, targets[:, None], weights[:, None] * (label_smoothing - 1))
    return slope.to(dtype)
