"""Short names of components: `optimizer: {_component_: adamw}` is `torch.optim.AdamW`.

A name without dots is looked up in the modules that its key is for; case and underscores do not
matter. Whatever is there can be named, so that a new data set needs no entry here.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from types import FunctionType
from typing import Any

from graphtune.config.instantiate import COMPONENT, Component
from graphtune.config.keys import did_you_mean, join_key
from graphtune.errors import UserError


@dataclass(frozen=True)
class _Shelf:
    """Modules to look in, the first that has a name wins, and what in them can be named."""

    modules: tuple[str, ...]
    fits: Callable[[Any], bool]


def _reads_data(found: Any) -> bool:
    """Data sets are functions that take a tokenizer first."""
    if not isinstance(found, FunctionType | partial):
        return False
    return next(iter(inspect.signature(found).parameters), None) == "tokenizer"


def _optimizes(found: Any) -> bool:
    return inspect.isclass(found) and hasattr(found, "zero_grad")


def _schedules(found: Any) -> bool:
    return inspect.isclass(found) and hasattr(found, "get_last_lr")


_DATA = _Shelf(("graphtune.data",), _reads_data)
_SHELVES = {
    "dataset": _DATA,
    "dataset_val": _DATA,
    "retention": _DATA,
    "optimizer": _Shelf(
        ("graphtune.training.optimizers", "torch.optim", "torchao.optim"), _optimizes
    ),
    "lr_scheduler": _Shelf(("torch.optim.lr_scheduler",), _schedules),
}
_ALIASES = {"muon": "graphtune.training.optimizers.MuonWithAdamW"}  # torch's has no embeddings
_OWN = ("graphtune", "torch", "torchao")


def with_dotted_path(component: Component) -> Component:
    """The component, its short name replaced by the dotted path; one with dots as it is.

    Raises:
        UserError: there is nothing of that name for the component's key.
    """
    shelf = _SHELVES.get(component.key.partition("[")[0])
    if "." in component.path or shelf is None:
        return component
    if (alias := _ALIASES.get(_plain(component.path))) is not None:
        return replace(component, path=alias)
    names: list[str] = []
    for module, name in _named(shelf):
        if _plain(name) == _plain(component.path):
            return replace(component, path=f"{module}.{name}")
        names.append(name)
    close = {name.lower(): name for name in names} | {_plain(name): name for name in names}
    hint = did_you_mean(component.path.lower(), close)
    raise UserError(
        f"`{join_key(component.key, COMPONENT)}={component.path}`: there is no such name in "
        f"{' or '.join(shelf.modules)}{hint}"
    )


def _named(shelf: _Shelf) -> Iterator[tuple[str, str]]:
    for module in shelf.modules:
        try:
            found = import_module(module)
        except ModuleNotFoundError:  # torchao comes with an extra
            continue
        for name in dir(found):
            if not name.startswith("_") and shelf.fits(getattr(found, name)):
                yield module, name


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def foreign_code(config: Any) -> list[tuple[str, str]]:
    """The key and dotted path of each component and pass that others than graphtune or torch wrote.

    Args:
        config: a config as plain mappings and lists.
    """
    found = []
    for key, node in _mappings(config, ""):
        path = node.get(COMPONENT)
        if isinstance(path, str) and _is_foreign(path):
            found.append((key, path))
        if key == "passes":
            found += [(key, str(name)) for name in node if _is_foreign(str(name))]
    return found


def _is_foreign(path: str) -> bool:
    return "." in path and path.partition(".")[0] not in _OWN


def _mappings(node: Any, key: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """A mapping and all mappings within it, with their dotted keys."""
    if isinstance(node, Mapping):
        yield key, node
        for name, value in node.items():
            yield from _mappings(value, join_key(key, str(name)))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _mappings(value, f"{key}[{index}]")
