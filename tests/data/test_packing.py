"""Rows against packing one document at a time, and how little padding they leave."""

from collections import Counter
from collections.abc import Sequence
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphtune.data.packing import Fit, pack
from graphtune.errors import UserError

LENGTH = 24
lengths = st.lists(st.integers(1, LENGTH), max_size=40)
fits = st.sampled_from(["best", "first"])


def packed(lengths: list[int], fit: Fit = "best", length: int = LENGTH) -> list[list[int]]:
    """Rows of lengths."""
    return [[lengths[i] for i in row] for row in pack(lengths, length, fit).rows()]


def one_by_one(lengths: list[int], fit: Fit) -> list[int]:
    """How full the rows are when documents are placed singly, longest first."""
    rows: list[int] = []
    for size in sorted(lengths, reverse=True):
        open_rows = [i for i, fill in enumerate(rows) if fill + size <= LENGTH]
        if not open_rows:
            rows.append(size)
        else:
            chosen = max(open_rows, key=lambda i: rows[i]) if fit == "best" else open_rows[0]
            rows[chosen] += size
    return rows


@given(lengths=lengths, fit=fits)
def test_rows_are_those_of_placing_documents_one_by_one(lengths: list[int], fit: Fit) -> None:
    pack_ = pack(lengths, LENGTH, fit)
    assert sorted(pack_.documents.tolist()) == list(range(len(lengths)))
    rows = packed(lengths, fit)
    assert all(rows)
    assert sorted(sum(row) for row in rows) == sorted(one_by_one(lengths, fit))
    assert all(row == sorted(row, reverse=True) for row in rows)


@given(lengths=lengths, fit=fits, randoms=st.randoms(use_true_random=False))
def test_the_order_of_documents_does_not_change_how_full_rows_are(
    lengths: list[int], fit: Fit, randoms: object
) -> None:
    before = Counter(tuple(row) for row in packed(lengths, fit))
    randoms.shuffle(lengths)  # type: ignore[attr-defined]
    assert Counter(tuple(row) for row in packed(lengths, fit)) == before


def test_first_fit_is_not_best_fit() -> None:
    assert packed([19, 11, 10, 3], "best") == [[19], [11, 10, 3]]
    assert packed([19, 11, 10, 3], "first") == [[19, 3], [11, 10]]


def log_normal() -> np.ndarray:
    """Lengths as instruction data has them: many short ones, a long tail."""
    random = np.random.default_rng(0)
    return np.clip(np.exp(random.normal(5.3, 1.0, 20_000)).astype(int), 8, 2048)


@pytest.mark.parametrize("fit", ["best", "first"])
@pytest.mark.parametrize(
    "lengths",
    [
        log_normal(),
        [len(text) for topic in topics.values() for text in topic.split("\n\n") if text],
    ],
    ids=["log-normal", "paragraphs"],
)
def test_at_least_98_percent_of_the_rows_is_filled(lengths: Sequence[int], fit: Fit) -> None:
    length = max(lengths)
    assert len(lengths) > 2000
    rows = pack(lengths, length, fit).rows()
    assert sum(lengths) / (len(rows) * length) >= 0.98


def test_documents_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="dataset.max_length: an example has 25 tokens.*holds 24"):
        pack([3, 25], LENGTH)
    with pytest.raises(UserError, match="an example has no tokens"):
        pack([3, 0], LENGTH)
