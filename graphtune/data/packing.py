"""Pack short documents into rows of one length, so that little computation goes to padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import TypedDict

from graphtune.data.dataset import IGNORE_INDEX, Example
from graphtune.errors import UserError


class Pack(TypedDict):
    """Several documents in one row; four lists of the same length.

    `position_ids` restart at 0 with each document, `document_ids` count the documents of the
    row from 0. Each document's first label is -100: the token before it belongs to another.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    document_ids: list[int]


def pack(examples: Sequence[Example], length: int) -> list[Pack]:
    """Pack `examples` whole into rows of at most `length` tokens.

    Best fit, longest first: each example goes into the row that it fills best, in an order that
    depends on lengths and positions in `examples` only (D. S. Johnson, 1973: at most 11/9 of
    the fewest possible rows, plus one).

    Raises:
        UserError: an example is longer than `length`.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    if order and (longest := len(examples[order[0]]["input_ids"])) > length:
        raise UserError(
            f"dataset.max_length: an example has {longest} tokens, but a row holds {length}; "
            f"set it to {length} or less"
        )
    rows: list[list[Example]] = []
    spaces: list[int] = []  # the distinct free spaces of open rows, ascending
    rows_with: dict[int, list[int]] = defaultdict(list)  # free space -> indices into `rows`
    for index in order:
        size = len(examples[index]["input_ids"])
        tightest = bisect_left(spaces, size)
        if tightest < len(spaces):
            space = spaces[tightest]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del spaces[tightest]
        else:
            space, row = length, len(rows)
            rows.append([])
        rows[row].append(examples[index])
        left = space - size
        if left and not rows_with[left]:
            insort(spaces, left)
        rows_with[left].append(row)
    return [concatenate(row) for row in rows]


def concatenate(examples: Sequence[Example]) -> Pack:
    """Lay `examples` end to end in one row."""
    row = Pack(input_ids=[], labels=[], position_ids=[], document_ids=[])
    for document, example in enumerate(examples):
        size = len(example["input_ids"])
        row["input_ids"] += example["input_ids"]
        row["labels"] += [IGNORE_INDEX, *example["labels"][1:]]
        row["position_ids"] += range(size)
        row["document_ids"] += [document] * size
    return row
