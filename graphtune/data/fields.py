"""Cells of rows: there, of the right type, and not empty; or a BadRow that names the field."""

from __future__ import annotations

import math
from typing import Any

from graphtune.data.files import ROW_LIMIT, UNREADABLE
from graphtune.data.rows import PLACE, Row, close_match
from graphtune.errors import UserError


class ImagesFound(UserError):
    """A conversation with an image, where text alone is read. Such rows are not left out: either
    the data or the model is not what was meant."""


class BadRow(UserError):
    """A row that cannot be used. Whoever reads rows adds the file and the row's number.

    Attributes:
        field: column, or path within one, such as `messages[2].role`.
        problem: what is wrong and what would be right.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:  # as other processes send it
        return BadRow, (self.field, self.problem)


def cell(row: Row, column: str) -> Any:
    """What the row has in `column`."""
    if UNREADABLE in row and row[UNREADABLE] is not None:
        raise BadRow(*row[UNREADABLE])
    if column not in row:
        known = [name for name in row if name != PLACE]
        raise BadRow(column, f"there is no such column; {close_match(column, known)}")
    return row[column]


def has(row: Row, column: str) -> bool:
    """Whether the row has anything in `column`, which it may lack."""
    return row.get(column) not in (None, "")


def text(row: Row, column: str) -> str:
    """The text in `column`."""
    return checked_text(cell(row, column), column)


def checked_text(value: Any, field: str) -> str:
    """`value`, if it is text with something in it that can be encoded."""
    if not isinstance(value, str):
        raise BadRow(field, f"must be text, not {value!r:.60}")
    if not value.strip():
        raise BadRow(field, "must not be empty")
    check_characters(value, field)
    return value


def check_characters(value: str, field: str) -> None:
    """Refuse a text that is too long, or that has characters which no encoding has."""
    if len(value) > ROW_LIMIT:
        raise BadRow(field, f"has {len(value):,} characters; a text may have {ROW_LIMIT:,}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # A byte that was not UTF-8 was read as a lone surrogate.
        raise BadRow(field, f"not valid UTF-8 (at character {error.start + 1})") from error


def cell_list(row: Row, column: str) -> list[Any]:
    """The list in `column`, which has at least one item."""
    value = cell(row, column)
    if not isinstance(value, list | tuple):
        raise BadRow(column, f"must be a list, not {value!r:.60}")
    if not value:
        raise BadRow(column, "must not be empty")
    return list(value)


def truth(value: Any, field: str) -> bool:
    """A boolean; also 0 and 1, and `true` and `false`, as CSV files have them."""
    spelled = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, str) and value.strip().lower() in spelled:
        return spelled[value.strip().lower()]
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise BadRow(field, f"must be true or false, not {value!r:.60}")


def number(value: Any, field: str) -> float:
    """A finite number of at least 0."""
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise BadRow(field, f"must be a number of at least 0, not {value!r:.60}")
    return float(value)
