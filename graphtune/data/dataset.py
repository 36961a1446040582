"""What every data source returns: a list of tokenised examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from graphtune.errors import UserError
from graphtune.losses import IGNORE_INDEX


class Example(TypedDict):
    """One document. `labels` has one entry per token of `input_ids`, *unshifted*: the loss
    compares the logits at position i with `labels[i + 1]`."""

    input_ids: list[int]
    labels: list[int]


class Dataset(list[Example]):
    """Examples, and how many were changed to fit `max_length`.

    Attributes:
        truncated: examples whose end was cut off.
        dropped: examples left out because the cut left nothing to train on.
    """

    truncated: int = 0
    dropped: int = 0

    @classmethod
    def build(cls, examples: Iterable[Example], *, max_length: int | None) -> Dataset:
        """Collect `examples`, each cut to at most `max_length` tokens (None: never).

        Raises:
            UserError: no example is left.
        """
        if max_length is not None and max_length < 2:
            raise UserError(f"dataset.max_length: {max_length} is too short; use 2 or more")
        dataset = cls()
        for example in examples:
            if max_length is not None and len(example["input_ids"]) > max_length:
                example = Example(
                    input_ids=example["input_ids"][:max_length],
                    labels=example["labels"][:max_length],
                )
                dataset.truncated += 1
            if has_target(example):
                dataset.append(example)
            else:
                dataset.dropped += 1
        if not dataset and not dataset.dropped:
            raise UserError("dataset: it holds no examples; check its source, split and filters")
        if not dataset:
            raise UserError(
                f"dataset.max_length: {max_length} leaves nothing to train on in any of the "
                f"{dataset.dropped} examples; raise it"
            )
        return dataset


def has_target(example: Example) -> bool:
    """Whether the loss has anything to predict; a document's first token never counts."""
    return any(label != IGNORE_INDEX for label in example["labels"][1:])
