"""Components: objects that a config names by their dotted path.

    optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}

`instantiate(config.optimizer, parameters)` calls `torch.optim.AdamW(parameters, lr=3e-4)`.
A config can so name any callable that Python can import: read one before you run it, as you
would a script.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, Unpack, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from graphtune.config.keys import did_you_mean, join_key
from graphtune.errors import UserError

COMPONENT = "_component_"


@dataclass(frozen=True)
class Component:
    """A callable by its dotted path, with keyword arguments for it.

    Attributes:
        path: the dotted path, `torch.optim.AdamW`.
        arguments: keyword arguments; mappings with `_component_` in them are components too.
        key: where the config has it, for error messages.
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    key: str = field(default="", compare=False)

    @classmethod
    def read(cls, node: Mapping[str, Any], key: str) -> "Component":
        """From a mapping with `_component_`; raises UserError if it has none."""
        arguments = dict(node)
        path = arguments.pop(COMPONENT, None)
        if not isinstance(path, str):
            raise UserError(
                f"`{join_key(key, COMPONENT)}` must name a callable, such as torch.optim.AdamW; "
                f"got {path!r}"
            )
        return cls(path, arguments, key)

    def without(self, name: str) -> "Component":
        """The same, but for one argument."""
        rest = {key: value for key, value in self.arguments.items() if key != name}
        return Component(self.path, rest, self.key)

    def takes(self, name: str) -> bool:
        """Whether the callable has a parameter of that name; raises UserError if there is none."""
        known = _parameter_names(component(self.path, self.key))
        return known is None or name in known

    def having(self, **arguments: Any) -> "Component":
        """The same, with other arguments."""
        return Component(self.path, {**self.arguments, **arguments}, self.key)

    def mapping(self) -> dict[str, Any]:
        """As the config writes it."""
        return {COMPONENT: self.path, **self.arguments}

    def check(self) -> None:
        """Resolve the path and compare the arguments' names with the callable's signature.

        Nothing is called, and arguments may be missing: the recipe adds the rest.

        Raises:
            UserError: a path that leads nowhere, or an argument that is not a parameter; in
                this component or one nested in it.
        """
        self._refuse_unknown(component(self.path, self.key), self.arguments)
        for nested in _components(self.arguments, self.key):
            nested.check()

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Call it; see `instantiate`."""
        target = component(self.path, self.key)
        own = {name: value for name, value in self.arguments.items() if name not in kwargs}
        self._refuse_unknown(target, self.arguments)
        arguments = {name: _build(value, join_key(self.key, name)) for name, value in own.items()}
        arguments |= kwargs
        signature = _signature(target)
        try:
            if signature is not None:
                signature.bind(*args, **arguments)
            return target(*args, **arguments)
        except UserError as error:
            raise UserError(f"`{self.key or self.path}`: {error}") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"`{self.key or COMPONENT}` ({self.path}): {error}") from error

    def _refuse_unknown(self, target: Callable[..., Any], names: Iterable[str]) -> None:
        known = _parameter_names(target)
        if known is None:
            return
        for name in names:
            if name not in known:
                raise UserError(
                    f"`{join_key(self.key, name)}`: {self.path} has no parameter `{name}`"
                    f"{did_you_mean(name, known)}"
                )


def instantiate(node: Component | Mapping[str, Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Call a component: `node._component_(*args, **(node's other keys | kwargs))`.

    Components nested in the arguments are called first, without `args`. None gives None, so
    that an optional component needs no test.

    Raises:
        UserError: a path that leads nowhere, an argument that is unknown, missing or refused
            by the callable (its TypeError or ValueError is the cause); names the config key.
    """
    if node is None:
        return None
    if isinstance(node, DictConfig):
        key = node._get_full_key(None)
        try:
            plain: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise UserError(f"`{error.full_key or key}`: {error.msg}") from error
        node = Component.read(plain, key)
    elif isinstance(node, Mapping):
        node = Component.read(node, "")
    elif not isinstance(node, Component):
        raise UserError(f"a component must be a mapping with `{COMPONENT}`; got {node!r}")
    return node.build(*args, **kwargs)


def component(path: str, key: str = "") -> Callable[..., Any]:
    """The callable at a dotted path: a class or function of a module, or a class's method.

    Args:
        path: such as `torch.optim.AdamW`.
        key: the component's config key, for error messages.

    Raises:
        UserError: not a dotted path, nothing there (with the nearest name), or not callable.
    """
    where = f"`{join_key(key, COMPONENT)}={path}`"
    first, *rest = path.split(".")
    if not rest or not all(part.isidentifier() for part in (first, *rest)):
        raise UserError(f"{where} is not a dotted path, such as torch.optim.AdamW")
    target: Any = _import(first, where)
    if target is None:
        raise UserError(f"{where}: no module named `{first}` is installed")
    for depth, name in enumerate(rest, start=1):
        parent = ".".join((first, *rest[: depth - 1]))
        if not hasattr(target, name):
            child = _import(f"{parent}.{name}", where) if isinstance(target, ModuleType) else None
            if child is None:
                raise UserError(
                    f"{where}: `{parent}` has no `{name}`{did_you_mean(name, dir(target))}"
                )
            target = child
        else:
            target = getattr(target, name)
    if not callable(target):
        raise UserError(f"{where} is a {type(target).__name__}, which cannot be called")
    return target


def _import(name: str, where: str) -> ModuleType | None:
    """The module, or None if there is none; one that fails on import is an error."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        raise UserError(f"{where}: {name} needs {error.name}, which is not installed") from error
    except ImportError as error:
        raise UserError(f"{where}: {name} cannot be imported: {error}") from error


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):  # some builtins do not tell
        return None


def _parameter_names(target: Callable[..., Any]) -> list[str] | None:
    """The names that `target` takes as keywords; None if it takes any, or does not tell.

    `**options: Unpack[Options]` takes the keys of the TypedDict `Options`.
    """
    signature = _signature(target)
    if signature is None:
        return None
    names = []
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_KEYWORD:
            options = _unpacked(target, parameter.name)
            if options is None:
                return None
            names += get_type_hints(options)
    return list(dict.fromkeys(names))


def _unpacked(target: Callable[..., Any], name: str) -> type | None:
    """`Options`, if the parameter `name` is declared as `**name: Unpack[Options]`."""
    while isinstance(target, partial):
        target = target.func
    function: Any = target.__init__ if inspect.isclass(target) else target
    try:
        hint = get_type_hints(function, include_extras=True).get(name)
    except (NameError, TypeError):  # annotations that only a type checker can resolve
        return None
    return get_args(hint)[0] if get_origin(hint) is Unpack else None


def _build(value: Any, key: str) -> Any:
    """The value with every component in it called."""
    if isinstance(value, Mapping):
        if COMPONENT in value:
            return Component.read(value, key).build()
        return {name: _build(item, join_key(key, str(name))) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_build(item, f"{key}[{index}]") for index, item in enumerate(value)]
    return value


def _components(value: Any, key: str) -> Iterable[Component]:
    """The outermost components in a value."""
    if isinstance(value, Mapping):
        if COMPONENT in value:
            yield Component.read(value, key)
            return
        for name, item in value.items():
            yield from _components(item, join_key(key, str(name)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _components(item, f"{key}[{index}]")
