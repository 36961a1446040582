"""What every data source returns: tokenised examples in an Arrow table, in memory or on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NotRequired, TypedDict, overload

import numpy as np
import pyarrow as pa
import torch

from graphtune.data.table import IMAGES, Batch, Part, Stored, documents, to_batch, token_keys
from graphtune.errors import UserError
from graphtune.losses import IGNORE_INDEX

Tokens = Sequence[int] | np.ndarray
"""A list, or a read-only int32 array (where a `Dataset` holds it): index, slice and iterate, but
do not add, which means another thing for arrays."""

Truncate = Literal["right", "left"]

_BATCH = 256  # examples per record batch


class Example(TypedDict):
    """One document.

    input_ids: token ids.
    labels: one per token, *unshifted*: the loss compares the logits at position i with
        `labels[i + 1]`; -100 is not learned.
    weights: what each label counts in the loss; 1 where the key is missing.
    images: tensors that the model's processor made of the document's images, by name.

    Objectives other than next-token prediction have examples of other kinds: a preference pair
    has the keys `chosen` and `rejected` with an example each, a question `prompt_ids`. Besides,
    there may be any keys (`label`, `answer`) with what JSON can hold.
    """

    input_ids: Tokens
    labels: Tokens
    weights: NotRequired[Sequence[float] | np.ndarray]
    images: NotRequired[dict[str, torch.Tensor]]


def has_target(example: Mapping[str, Any]) -> bool:
    """Whether the loss has anything to predict in an example, and in each one of a pair.

    The first label never counts, as no token comes before it. A question needs a token.
    """
    return all(
        any(label != IGNORE_INDEX for label in document["labels"][1:])
        if "input_ids" in document
        else len(document["prompt_ids"]) > 0
        for document in documents(example).values()
    )


def fit(
    example: Mapping[str, Any], max_length: int | None, truncate: Truncate
) -> tuple[Mapping[str, Any] | None, bool]:
    """Cut an example, or each one of a pair, to `max_length` tokens (None: never).

    Args:
        truncate: "right" takes tokens off the end, "left" off the beginning.

    Returns:
        The example, or None if nothing to learn is left; and whether it was too long. One with
        images is not cut, as its tokens stand for patches of them: it is None then.
    """
    parts = documents(example)
    longest = max(_length(document) for document in parts.values())
    long = max_length is not None and longest > max_length
    if long:
        assert max_length is not None
        if has_images(example):
            return None, True
        kept = slice(max_length) if truncate == "right" else slice(-max_length, None)
        cut = {name: _cut(document, kept) for name, document in parts.items()}
        example = cut.pop("", example) | cut  # type: ignore[operator]
    return (example if has_target(example) else None), long


def has_images(example: Mapping[str, Any]) -> bool:
    return any(IMAGES in document for document in documents(example).values())


def _length(document: Mapping[str, Any]) -> int:
    sizes = {len(document[key]) for key in token_keys(document) if key in document}
    if len(sizes) != 1:
        raise ValueError(f"an example needs as many labels and weights as tokens, not {sizes}")
    return sizes.pop()


def _cut(document: Mapping[str, Any], kept: slice) -> dict[str, Any]:
    keys = token_keys(document)
    return {key: value[kept] if key in keys else value for key, value in document.items()}


def check_max_length(max_length: int | None) -> None:
    """Raises UserError if no example can fit."""
    if max_length is not None and max_length < 2:
        raise UserError(f"dataset.max_length: {max_length} is too short; use 2 or more")


def check_piece_length(length: int) -> None:
    """Raises UserError if cuts cannot leave two or more tokens on either side."""
    if length < 4:
        raise UserError(f"dataset.max_length: {length} is too short to split; use 4 or more")


class Dataset(Sequence[Example]):
    """Examples by number, and how many were changed or left out.

    Attributes:
        dropped: examples left out because, cut to `max_length`, they had nothing to learn.
        skipped: rows left out because they were bad.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        indices: np.ndarray | None = None,
        *,
        dropped: int = 0,
        skipped: int = 0,
    ) -> None:
        self._parts = parts
        self._indices = indices  # int64, into the rows of all parts; None: all of them
        self.dropped = dropped
        self.skipped = skipped

    @classmethod
    def build(
        cls,
        examples: Iterable[Mapping[str, Any]],
        *,
        max_length: int | None,
        truncate: Truncate = "right",
    ) -> Dataset:
        """Collect `examples` in memory, each cut to at most `max_length` tokens (None: never).

        Raises:
            UserError: no example is left.
        """
        check_max_length(max_length)
        batches, dropped = [], 0
        with_images: dict[int, Mapping[str, Any]] = {}
        numbered = enumerate(examples)
        while chunk := list(islice(numbered, _BATCH)):
            kept, lost = fit_all(chunk, max_length, truncate)
            with_images |= {row: example for row, example in chunk if has_images(example)}
            batches += [to_batch(kept)] if kept else []
            dropped += lost
        if not batches:
            raise nothing_left(max_length, dropped)
        table = pa.Table.from_batches(batches)
        return cls([Part(table, with_images.__getitem__)], dropped=dropped)

    @cached_property
    def _batches(self) -> list[Batch]:
        return [
            Batch(batch, part.again) for part in self._parts for batch in part.table.to_batches()
        ]

    @cached_property
    def _starts(self) -> np.ndarray:
        """The number of each batch's first example, and that after the last."""
        return np.cumsum([0, *(len(batch) for batch in self._batches)])

    def _over_all(self, values: Iterable[np.ndarray]) -> np.ndarray:
        column = np.concatenate(list(values))
        return column if self._indices is None else column[self._indices]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32, tokens of each example (examples,); of pairs (examples, 2)."""
        return self._over_all(batch.lengths() for batch in self._batches)

    @cached_property
    def truncated(self) -> int:
        """How many examples were cut to `max_length`."""
        return int(self._over_all(batch.cut for batch in self._batches).sum())

    def __len__(self) -> int:
        return int(self._starts[-1] if self._indices is None else len(self._indices))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Example | Dataset:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        number = range(len(self))[index]  # from the end if negative; raises IndexError
        if self._indices is not None:
            number = self._indices[number]
        batch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._batches[batch][number - self._starts[batch]]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Whether the examples are the same; slow."""
        if not isinstance(other, Dataset):
            return NotImplemented
        return len(self) == len(other) and all(map(_same, self, other))

    def __repr__(self) -> str:
        return f"Dataset({len(self)} examples)"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_batches", "_starts")}

    def select(self, indices: Iterable[int]) -> Dataset:
        """These examples in this order, without a copy; `dropped` and `skipped` stay."""
        chosen = np.fromiter(indices, np.int64)
        if len(chosen) and not -len(self) <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"there are {len(self)} examples")
        chosen %= max(len(self), 1)
        chosen = chosen if self._indices is None else self._indices[chosen]
        return Dataset(self._parts, chosen, dropped=self.dropped, skipped=self.skipped)

    def in_pieces(self, length: int) -> Dataset:
        """Every example cut into consecutive pieces of `length` tokens, the last one shorter.

        As no piece may consist of a single token, which has nothing to predict, the last cut
        comes a token earlier where one would be left. The first token of a piece is not
        predicted. Nothing is copied; examples must be whole, without weights or images.

        Raises:
            UserError: `length` is less than 4.
        """
        check_piece_length(length)
        assert self._indices is None
        parts = [part.in_pieces(length) for part in self._parts]
        return Dataset(parts, dropped=self.dropped, skipped=self.skipped)

    @classmethod
    def concatenate(cls, datasets: Sequence[Dataset]) -> Dataset:
        """One data set after the other, without a copy.

        Raises:
            UserError: their examples are of different kinds.
        """
        kinds = [list(batch.ids) for dataset in datasets for batch in dataset._batches[:1]]
        if any(kind != kinds[0] for kind in kinds):
            raise UserError(
                "dataset: data sets of different kinds cannot be mixed; their examples have "
                + " and ".join(dict.fromkeys(", ".join(kind) for kind in kinds))
            )
        starts = np.cumsum([0, *(dataset._starts[-1] for dataset in datasets)])
        indices = [
            start + (np.arange(len(dataset)) if dataset._indices is None else dataset._indices)
            for start, dataset in zip(starts, datasets, strict=False)
        ]
        return cls(
            [part for dataset in datasets for part in dataset._parts],
            np.concatenate(indices),
            dropped=sum(dataset.dropped for dataset in datasets),
            skipped=sum(dataset.skipped for dataset in datasets),
        )


def fit_all(
    examples: Iterable[tuple[int, Mapping[str, Any]]], max_length: int | None, truncate: Truncate
) -> tuple[list[Stored], int]:
    """`fit` of numbered examples; those that are kept, and how many are not.

    Images are let go of at once: a few hundred examples' would fill the memory.
    """
    kept, dropped = [], 0
    for row, example in examples:
        fitted, cut = fit(example, max_length, truncate)
        if fitted is None:
            dropped += 1
        else:
            kept.append(Stored(_without_images(fitted), row, cut, has_images(fitted)))
    return kept, dropped


def _without_images(example: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: _without_images(d) for name, d in documents(example).items() if name}
    return {key: parts.get(key, value) for key, value in example.items() if key != IMAGES}


def nothing_left(max_length: int | None, dropped: int) -> UserError:
    """The error for a data set without examples."""
    if not dropped:
        return UserError("dataset: it holds no examples; check its source, split and filters")
    if max_length is None:
        return UserError(f"dataset: there is nothing to learn in any of the {dropped} examples")
    return UserError(
        f"dataset.max_length: {max_length} leaves nothing to train on in any of the "
        f"{dropped} examples; raise it"
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray | torch.Tensor):
        return bool(np.array_equal(one, other))
    return bool(one == other)
