"""Names in configs: dotted keys, and the closest right name to a wrong one."""

import difflib
from collections.abc import Iterable


def join_key(key: str, name: str) -> str:
    """`optimizer` and `lr` make `optimizer.lr`; at the top, `name` alone."""
    return f"{key}.{name}" if key else name


def close_match(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` was most likely meant to be, or None."""
    matches = difflib.get_close_matches(name, list(candidates), n=1)
    return matches[0] if matches else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The end of an error message: the closest name, or all of them if they are few."""
    names = list(candidates)
    if match := close_match(name, names):
        return f"; did you mean `{match}`?"
    return f"; there are: {', '.join(names)}" if 0 < len(names) <= 30 else ""
