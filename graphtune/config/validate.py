"""Checks a config against a schema of dataclasses, and a pass's options against the pass.

Both are one walk over dataclass fields, so that a config key, a nested key and an option of a
pass give the same errors: the full dotted key, the value, and the closest right key.
"""

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graphtune.config.instantiate import COMPONENT, Component, component
from graphtune.config.keys import close_match, did_you_mean, join_key
from graphtune.config.names import with_dotted_path
from graphtune.config.schema import SFTConfig
from graphtune.errors import UserError

T = TypeVar("T")

_KINDS: dict[Any, str] = {
    Any: "anything",
    NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Component: f"a dotted path or a name, or a mapping with `{COMPONENT}`",
}


def validate(
    config: DictConfig,
    schema: type[T] = SFTConfig,  # type: ignore[assignment]
    registry: Mapping[str, type] | None = None,
) -> T:
    """Check a config against its recipe's schema; nothing is loaded or built.

    Args:
        config: what `load_config` gave; interpolations are resolved here.
        schema: the recipe's dataclass.
        registry: the passes by name; where it is given, the names and options under `passes`
            are checked too.

    Raises:
        UserError: an unknown or missing key, a value of the wrong type, or a component or a
            pass that does not exist or does not take an argument that it is given.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        problem = str(error.msg).partition("\n")[0]
        raise UserError(f"`{error.full_key}`: {problem}") from error
    checked = _with_components(check_options(schema, plain, ""))  # type: ignore[arg-type]
    if registry is not None:
        for name, options in getattr(checked, "passes", {}).items():
            key = f"passes.{name}"
            if name not in registry and "." not in name:
                raise UserError(f"unknown pass `{key}`{did_you_mean(name, registry)}")
            kind: Any = registry[name] if name in registry else component(name, key)
            check_options(kind, options or {}, key)
    return checked


def _with_components(config: T) -> T:
    """A config whose components have dotted paths, and are known to take their arguments."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        if isinstance(value, Component):
            found[item.name] = with_dotted_path(value)
            found[item.name].check()
        elif isinstance(value, list) and any(isinstance(one, Component) for one in value):
            found[item.name] = [with_dotted_path(one) for one in value]
            for one in found[item.name]:
                one.without("weight").check()  # its share of a mixture, which it never sees
    return dataclasses.replace(config, **found)  # type: ignore[type-var]


def check_options(cls: type[T], options: Mapping[str, Any], key: str) -> T:
    """An instance of the dataclass `cls` from a config's mapping.

    Args:
        cls: a dataclass whose fields have the types null, bool, int, float, str, `Literal`,
            lists, tuples, mappings, `Component`, dataclasses, and unions of these.
        options: field name -> value.
        key: where the config has them, `passes.lora`; "" for the config itself.

    Raises:
        UserError: an option that is unknown, missing or of the wrong type, or one that the
            dataclass itself refuses with a ValueError.
    """
    if not dataclasses.is_dataclass(cls):
        raise UserError(f"`{key}`: {cls!r} is not a dataclass, so it has no options")
    fields = {item.name: item for item in dataclasses.fields(cls) if item.init}
    hints = get_type_hints(cls)
    for name, value in options.items():
        if name not in fields:
            raise UserError(_unknown(cls, str(name), value, key))
    values: dict[str, Any] = {}
    for name, item in fields.items():
        full_key = join_key(key, name)
        if name in options:
            value = options[name]
        elif dataclasses.is_dataclass(hints[name]) and hints[name] is not Component:
            value = {}  # so that what is missing in it is named
        elif _default(item) is dataclasses.MISSING:
            doc = item.metadata.get("doc")
            raise UserError(f"missing `{full_key}`" + (f": {doc}" if doc else ""))
        else:
            continue
        if isinstance(value, Mapping) and isinstance(default := _default(item), Component):
            value = value if COMPONENT in value else default.mapping() | dict(value)
        values[name] = _convert(hints[name], value, full_key)
        least = item.metadata.get("at_least")
        if least is not None and values[name] is not None and values[name] < least:
            raise UserError(f"`{full_key}={_show(value)}` must be at least {least:g}")
    try:
        return cls(**values)
    except ValueError as error:
        named = key in str(error)  # also where the key is "", the config itself
        raise UserError(str(error) if named else f"`{key}`: {error}") from error


def to_yaml(config: Any) -> str:
    """A validated config as YAML with every default filled in; `load_config` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def _convert(hint: Any, value: Any, key: str) -> Any:
    """The value as the type `hint` wants it; UserError if it cannot be."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return _convert_union(hint, value, key)
    if origin is Literal:
        if value in parts and type(value) in {type(part) for part in parts}:
            return value
        close = close_match(str(value), [str(part) for part in parts])
        hint_end = f"; did you mean `{close}`?" if close else ""
        raise UserError(f"`{key}={_show(value)}` must be {_describe(hint)}{hint_end}")
    if hint is Component and isinstance(value, str):
        return Component(value, {}, key)
    if isinstance(value, Mapping):
        if hint is Component:
            return Component.read(value, key)
        if dataclasses.is_dataclass(hint):
            return check_options(hint, value, key)  # type: ignore[arg-type]
        if issubclass(origin or hint, Mapping):
            item = parts[1] if parts else Any
            return {name: _convert(item, v, join_key(key, str(name))) for name, v in value.items()}
    elif isinstance(value, list | tuple):
        if hint is not str and issubclass(origin or hint, Sequence):
            return _convert_sequence(origin or hint, parts, value, key)
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    how = ""
    if hint is str and isinstance(value, int | float):
        how = " (in quotes)"
    elif isinstance(value, str) and origin in (list, tuple, Sequence):
        how = f", such as [{value}]"
    raise UserError(f"`{key}={_show(value)}` must be {_describe(hint)}{how}")


def _convert_union(hint: Any, value: Any, key: str) -> Any:
    """The first member that fits. Where only one could, its own error says most."""
    members = [member for member in get_args(hint) if member is not NoneType]
    if value is None and len(members) < len(get_args(hint)):
        return None
    if isinstance(value, Mapping) and Component in members:
        members = [m for m in members if (m is Component) == (COMPONENT in value)] or members
    if len(members) == 1 and value is not None:
        return _convert(members[0], value, key)
    for member in members:
        try:
            return _convert(member, value, key)
        except UserError:
            continue
    raise UserError(f"`{key}={_show(value)}` must be {_describe(hint)}")


def _convert_sequence(kind: type, parts: tuple[Any, ...], value: Sequence[Any], key: str) -> Any:
    """A list, or a tuple where the type says so: `tuple[X, ...]` or `tuple[X, Y]`."""
    fixed = kind is tuple and bool(parts) and Ellipsis not in parts
    if fixed and len(parts) != len(value):
        raise UserError(f"`{key}={_show(value)}` must have {len(parts)} values")
    items = parts if fixed else [parts[0] if parts else Any] * len(value)
    converted = [
        _convert(item, v, f"{key}[{i}]")
        for i, (item, v) in enumerate(zip(items, value, strict=True))
    ]
    return tuple(converted) if kind is tuple else converted


def _describe(hint: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in _KINDS:
        return _KINDS[hint]
    if origin in (Union, UnionType):
        return " or ".join(_describe(part) for part in parts)
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(str(part) for part in parts)
    if dataclasses.is_dataclass(hint) or issubclass(origin or hint, Mapping):
        return "a mapping"
    if issubclass(origin or hint, Sequence):
        return f"a list of {_describe(parts[0])}" if parts and parts[0] is not Any else "a list"
    return f"a {hint.__name__}, which a config cannot give"


def _unknown(cls: type, name: str, value: Any, key: str) -> str:
    """Names the closest key: a sibling, else one of the same name further in."""
    siblings = [item.name for item in dataclasses.fields(cls) if item.init]
    deeper = [path for path in _keys(cls, key) if path.rpartition(".")[2] == name]
    if close := close_match(name, siblings):
        hint = f"; did you mean `{join_key(key, close)}`?"
    elif deeper:
        hint = f"; did you mean `{deeper[0]}`?"
    else:
        hint = did_you_mean(name, siblings)
    return f"unknown key `{join_key(key, name)}={_show(value)}`{hint}"


def _keys(cls: type, prefix: str) -> Iterator[str]:
    """Every dotted key of a schema."""
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        path = join_key(prefix, item.name)
        yield path
        for part in (hints[item.name], *get_args(hints[item.name])):
            if dataclasses.is_dataclass(part) and part is not Component:
                yield from _keys(part, path)  # type: ignore[arg-type]


def _default(item: "dataclasses.Field[Any]") -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def to_plain(value: Any) -> Any:
    """Dataclasses, components and tuples as mappings and lists."""
    if isinstance(value, Component):
        return to_plain(value.mapping())
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def _show(value: Any) -> str:
    """A value as YAML would write it, on one short line."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return textwrap.shorten(text, 60, placeholder=" ...")
