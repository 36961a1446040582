"""Rules: which sites a pass acts on, and with which options.

A pass's `targets` is a list of rules, and the first that matches a site decides. A rule is one
pattern, or a mapping of a pattern and of what differs there from the pass's own options:

    targets: [all-linear]
    targets:
      - {sites: "*.down_proj", layers: [8..15], rank: 32}
      - {sites: "re:.*layers\\.0\\..*", skip: true}
      - all-linear
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from graphtune.errors import UserError

ALL_LINEAR = "all-linear"
Target: TypeAlias = str | Mapping[str, Any]
Layers: TypeAlias = Sequence[int | str]


class Place(Protocol):
    """What rules choose among: a site, or a module that will become one."""

    @property
    def name(self) -> str:
        """Qualified name, as in the checkpoint."""

    @property
    def in_all_linear(self) -> bool:
        """Whether `all-linear` covers it."""


@dataclass(frozen=True)
class Named:
    """A place that is nothing but its name, such as a parameter."""

    name: str
    in_all_linear: bool = False


def match(
    places: Iterable[Place],
    targets: Sequence[Target],
    *,
    layers: Layers | None = None,
    key: str,
) -> dict[str, dict[str, Any]]:
    """The names that the rules choose, each with the options that its rule overrides.

    Args:
        places: all that the pass could act on.
        targets: rules; the first that matches a name decides. A pattern is a glob on the
            qualified name (`*.layers.3.*.q_proj`), a last name alone (`q_proj`), a regular
            expression behind `re:` that must match the whole name, or `all-linear`: every linear
            and expert but the output head and routers. A mapping has `sites`, a pattern or a
            list of them, optionally `layers`, and either options or `skip: true`.
        layers: numbers of the layers that are meant, `8` or ranges `8..15`, both ends included;
            None for all. The number of a layer is the first one in the qualified name.
        key: the config key that errors name, `passes.lora.targets`; layers are its neighbour.

    Returns:
        Options by name, in the order of `places`; empty where the rule is a pattern alone.

    Raises:
        UserError: a rule matches no name (the message shows the nearest), or is malformed.
    """
    known = {place.name: place.in_all_linear for place in places}
    inside = _within(known, layers, f"{key.rpartition('.')[0]}.layers")
    chosen: dict[str, dict[str, Any]] = {}
    skipped: set[str] = set()
    for index, target in enumerate(targets):
        here = key
        if isinstance(target, str):
            patterns, options, own = [target], {}, inside
        else:
            here = f"{key}[{index}]"
            options = dict(target)
            patterns = _patterns(options.pop("sites", None), here)
            own = _within(inside, options.pop("layers", None), f"{here}.layers")
        skip = options.pop("skip", False)
        for pattern in patterns:
            for name in _matching(pattern, own, here):
                if name not in chosen and name not in skipped:
                    skipped.add(name) if skip else chosen.update({name: options})
    return {name: chosen[name] for name in known if name in chosen}


def _patterns(sites: Any, key: str) -> list[str]:
    patterns = [sites] if isinstance(sites, str) else sites
    if not patterns or not all(isinstance(one, str) for one in patterns):
        raise UserError(f"`{key}.sites={sites}` must be a pattern, such as '*.q_proj', or a list")
    return list(patterns)


def _matching(pattern: str, known: Mapping[str, bool], key: str) -> list[str]:
    found = [name for name, linear in known.items() if _matches(name, linear, pattern, key)]
    if not found:
        nearest = ", ".join(_nearest(pattern, list(known))) or "none, the model has no such sites"
        raise UserError(f"`{key}`: {pattern!r} matches no site of this model; nearest: {nearest}")
    return found


def _matches(name: str, linear: bool, pattern: str, key: str) -> bool:
    if pattern == ALL_LINEAR:
        return linear
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise UserError(f"`{key}`: {pattern!r} is no regular expression: {error}") from None
    return fnmatch.fnmatchcase(name, pattern) or name.endswith("." + pattern)


def _within(known: Mapping[str, bool], layers: Layers | None, key: str) -> Mapping[str, bool]:
    """Those names that lie in the given layers."""
    if layers is None:
        return known
    wanted = _layer_numbers(layers, key)
    numbers = {name: _layer_of(name) for name in known}
    last = max((n for n in numbers.values() if n is not None), default=None)
    if last is None or any(number > last for number in wanted):
        raise UserError(
            f"`{key}={_show(layers)}`: the model has layers 0..{last}"
            if last is not None
            else f"`{key}={_show(layers)}`: the model has no numbered layers"
        )
    return {name: linear for name, linear in known.items() if numbers[name] in wanted}


def _layer_numbers(layers: Layers, key: str) -> set[int]:
    numbers: set[int] = set()
    for entry in [layers] if isinstance(layers, str | int) else layers:
        text = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(entry))
        first, last = (int(text[1]), int(text[2] or text[1])) if text else (1, 0)
        if last < first:
            raise UserError(f"`{key}={_show(layers)}` must be numbers and ranges, such as [8..15]")
        numbers.update(range(first, last + 1))
    return numbers


def _show(layers: Layers) -> str:
    return layers if isinstance(layers, str) else "[" + ", ".join(map(str, layers)) + "]"


def _layer_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _nearest(target: str, names: Sequence[str]) -> list[str]:
    """Names people may have meant: last names first, since a typo is mostly there."""
    last = re.split(r"[.*\\]", target)[-1] or target
    leaves = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    found = difflib.get_close_matches(last, leaves, n=3, cutoff=0.5)
    return found or difflib.get_close_matches(target, names, n=3, cutoff=0.3) or leaves[:8]
