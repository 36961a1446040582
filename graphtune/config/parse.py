"""From a config's name and the command line's overrides to one `DictConfig`.

A config is a YAML file or a name of the catalogue `graphtune.configs`. Interpolations
(`${model.id}`) are kept as they are written, so that an override of the key that they point
to wins; `validate` resolves them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graphtune.config.compose import read_config
from graphtune.config.keys import did_you_mean
from graphtune.errors import UserError


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a config and apply the command line's overrides in their order.

    Args:
        name_or_path: a YAML file or a name of the catalogue.
        overrides: `key.path=value`, the value read as YAML (`None` is null too), and
            `~key.path`, which removes a key. On a component a bare name replaces only its
            `_component_`: `optimizer=torch.optim.SGD`.

    Raises:
        UserError: no such config, YAML that cannot be read, or an override that is not of one
            of these forms, or removes what is not there.
    """
    for argument in (name_or_path, *overrides):
        _refuse_flag(argument)
    config = read_config(name_or_path)
    for override in overrides:
        if override.startswith("~"):
            _remove(config, override)
        else:
            _assign(config, override)
    return config


def _refuse_flag(argument: str) -> None:
    if argument.startswith("-"):
        key, _, value = argument.lstrip("-").partition("=")
        raise UserError(
            f"unknown option `{argument}`; config keys are set without dashes: "
            f"`{key or 'key'}={value or 'value'}`"
        )


def _assign(config: DictConfig, override: str) -> None:
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise UserError(f"override `{override}` must read `key=value` or `~key`")
    value = _parse_value(override, text)
    if isinstance(value, str) and _is_component(_select(config, key)):
        key = f"{key}._component_"
    try:
        OmegaConf.update(config, key, value)
    except (OmegaConfBaseException, IndexError) as error:
        raise UserError(f"override `{override}`: {_first_line(error)}") from error


def _parse_value(override: str, text: str) -> Any:
    """The value as a YAML file would have it; a reference `${key}` stays one."""
    if text == "None":  # Python's spelling, which YAML reads as text
        return None
    try:
        parsed = OmegaConf.from_dotlist([f"value={text}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override `{override}`: `{text}` is not valid YAML") from error
    return OmegaConf.to_container(parsed, resolve=False)["value"]  # type: ignore[index,call-overload]


def _remove(config: DictConfig, override: str) -> None:
    key = override.removeprefix("~")
    parent_key, _, name = key.rpartition(".")
    parent = _select(config, parent_key) if parent_key else config
    if not isinstance(parent, DictConfig) or name not in parent:
        names = [f"~{k}" for k in _keys(OmegaConf.to_container(config))]
        raise UserError(f"cannot remove `{key}`: no such key{did_you_mean(override, names)}")
    del parent[name]


def _select(config: DictConfig, key: str) -> Any:
    """The node at a dotted key, or None."""
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:  # the path leads through a value that has no keys
        return None


def _is_component(node: Any) -> bool:
    return isinstance(node, DictConfig) and "_component_" in node


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield f"{prefix}{name}"
            yield from _keys(value, f"{prefix}{name}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
