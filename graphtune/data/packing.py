"""Pack short documents into rows of one length, so that little computation goes to padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from graphtune.errors import UserError

Fit = Literal["best", "first"]
Indices = NDArray[np.int64]


class Pack(NamedTuple):
    """Which documents share which row; a sequence of rows, kept as two arrays.

    documents: int64 (documents,), every document once, row after row.
    offsets: int64 (rows + 1,): row r holds `documents[offsets[r]:offsets[r + 1]]`.
    """

    documents: Indices
    offsets: Indices

    def rows(self) -> list[Indices]:
        """The documents of each row, longest first."""
        return np.split(self.documents, self.offsets[1:-1]) if len(self.offsets) > 1 else []


def pack(lengths: Sequence[int] | NDArray[Any], length: int, fit: Fit = "best") -> Pack:
    """Pack documents of `lengths` tokens whole into rows of at most `length`.

    Longest first, each document goes into the open row that it fills best (`best`), or into the
    first that has room (`first`): D. S. Johnson, 1973; both need at most 11/9 of the fewest
    possible rows, plus one. The result depends on `lengths` alone, and how many documents of
    which lengths a row gets on the multiset of `lengths` alone: documents that are equally long
    are taken in their order, so that shuffling them gives other neighbours in as many rows.

    Documents of one length are placed together, which takes numpy a few steps for each distinct
    length: about a second for a million documents.

    Raises:
        UserError: a document is longer than `length`, or empty.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    check_lengths(sizes, length)
    order = np.argsort(-sizes, kind="stable")
    distinct, counts = np.unique(sizes, return_counts=True)
    place = _best_fit if fit == "best" else _first_fit
    row_of = place(distinct[::-1].tolist(), counts[::-1].tolist(), length)
    by_row = np.argsort(row_of, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of))]).astype(np.int64)
    return Pack(order[by_row], offsets)


def check_lengths(sizes: NDArray[Any], length: int) -> None:
    """Refuse documents that no row of `length` tokens can hold.

    Raises:
        UserError: a document is longer than `length`, or empty.
    """
    if sizes.size and (longest := int(sizes.max())) > length:
        raise UserError(
            f"dataset.max_length: an example has {longest} tokens, but a row holds {length}; "
            f"set it to {length} or less"
        )
    if sizes.size and sizes.min() < 1:
        raise UserError("dataset: an example has no tokens; leave it out")


def _best_fit(sizes: list[int], counts: list[int], length: int) -> Indices:
    """The row of each document, for `counts[i]` documents of `sizes[i]`, largest size first.

    The tightest row with room for a document stays the tightest for the next of the same size,
    until it has no more room: so rows are filled in turn, those of equal free space together.
    """
    placed: list[Indices] = []
    spaces: list[int] = []  # the distinct free spaces of open rows, ascending
    rows_with: dict[int, list[Indices]] = {}  # free space -> rows
    opened = 0

    def leave(space: int, rows: Indices) -> None:
        if len(rows) and space >= sizes[-1]:  # else nothing fits in any more
            if space not in rows_with:
                insort(spaces, space)
            rows_with.setdefault(space, []).append(rows)

    for size, count in zip(sizes, counts, strict=True):
        while count:
            tightest = bisect_left(spaces, size)
            if tightest < len(spaces):
                space = spaces[tightest]
                rows = rows_with[space].pop()
                if not rows_with[space]:
                    del spaces[tightest], rows_with[space]
            else:
                space = length
                rows = np.arange(opened, opened - (-count // (length // size)))
                opened += len(rows)
            each = space // size
            full = min(len(rows), count // each)
            placed.append(np.repeat(rows[:full], each))
            leave(space - each * size, rows[:full])
            count -= full * each
            rest = rows[full:]
            if count and len(rest):  # fewer than would fill the next row
                placed.append(np.repeat(rest[:1], count))
                leave(space - count * size, rest[:1])
                count, rest = 0, rest[1:]
            leave(space, rest)
    return np.concatenate(placed) if placed else np.zeros(0, np.int64)


def _first_fit(sizes: list[int], counts: list[int], length: int) -> Indices:
    """As `_best_fit`, but rows are filled in the order in which they were opened."""
    placed: list[Indices] = []
    rows = np.zeros(0, np.int64)  # the open ones
    spaces = np.zeros(0, np.int64)  # of each
    opened = 0
    for size, count in zip(sizes, counts, strict=True):
        room = spaces // size
        before = np.cumsum(room) - room
        taken = np.clip(count - before, 0, room)
        placed.append(np.repeat(rows, taken))
        spaces = spaces - taken * size
        if left := count - int(taken.sum()):
            each = length // size
            new = np.full(-(-left // each), each)
            new[-1] -= len(new) * each - left
            fresh = np.arange(opened, opened + len(new))
            opened += len(new)
            placed.append(np.repeat(fresh, new))
            rows = np.concatenate([rows, fresh])
            spaces = np.concatenate([spaces, length - new * size])
        useful = spaces >= sizes[-1]
        rows, spaces = rows[useful], spaces[useful]
    return np.concatenate(placed) if placed else np.zeros(0, np.int64)
