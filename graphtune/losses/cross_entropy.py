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


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the next-token cross entropy over all labelled tokens, in nats.

    A sum, not a mean, so that micro-batches and ranks add up to one large batch: divide by
    `labelled_tokens` of all of them.

    Args:
        logits: (batch, seq, vocab), any float dtype; computed in float32.
        labels: int64 (batch, seq), unshifted, -100 where nothing is to be learned.

    Returns:
        Scalar float32.
    """
    flat = logits.float().flatten(0, 1)
    return F.cross_entropy(
        flat, shift_labels(labels).flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def labelled_tokens(labels: Tensor) -> Tensor:
    """Number of tokens that the loss sums over, a scalar int64."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()
