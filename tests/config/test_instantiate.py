"""Components: the object that is built is the one that Python would have built."""

import collections
import datetime
import fractions
import functools
import sys
from typing import Any, TypedDict, Unpack

import pytest
from omegaconf import OmegaConf

from graphtune.config import Component, component, instantiate
from graphtune.errors import UserError


class Recorder:
    """Remembers what it was called with."""

    def __init__(self, *args: Any, size: int = 1, inner: Any = None, **others: Any) -> None:
        self.args, self.size, self.inner, self.others = args, size, inner, others

    @classmethod
    def of_size(cls, size: int) -> "Recorder":
        return cls(size=size)


def strict(source: str, limit: int = 10) -> tuple[str, int]:
    if limit < 0:
        raise ValueError("limit must not be negative")
    return source, limit


def failing(source: str) -> None:
    raise UserError(f"source {source!r} is empty")


class Options(TypedDict, total=False):
    max_length: int
    split: str


class MoreOptions(Options, total=False):
    template: str


def with_options(source: str, **options: Unpack[MoreOptions]) -> Any:
    return source, options


class WithOptions:
    def __init__(self, **options: Unpack[Options]) -> None:
        self.options = options


partly = functools.partial(with_options, source="given", split="test")

not_callable = 3


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module as `things`, whatever name pytest imported it under."""
    monkeypatch.setitem(sys.modules, "things", sys.modules[__name__])


def test_a_class_is_called_with_its_keys() -> None:
    node = {"_component_": "datetime.timedelta", "days": 2, "hours": 3}
    assert instantiate(node) == datetime.timedelta(days=2, hours=3)


def test_positional_and_keyword_arguments_of_the_caller_win() -> None:
    made = instantiate({"_component_": "things.Recorder", "size": 2, "x": 1}, "a", size=5, y=2)
    assert (made.args, made.size, made.others) == (("a",), 5, {"x": 1, "y": 2})


def test_functions_methods_and_nested_paths() -> None:
    assert instantiate({"_component_": "things.Recorder.of_size", "size": 4}).size == 4
    assert component("fractions.Fraction.from_float") == fractions.Fraction.from_float
    assert component("collections.abc.Mapping") is collections.abc.Mapping
    assert component("importlib.metadata.version").__name__ == "version"


def test_nested_components_come_first_and_get_no_caller_arguments() -> None:
    node = {
        "_component_": "things.Recorder",
        "inner": {"_component_": "things.Recorder", "size": 7},
        "many": [{"_component_": "datetime.date", "year": 2020, "month": 1, "day": 2}, 3],
        "plain": {"deep": {"_component_": "fractions.Fraction", "numerator": 1}},
    }
    made = instantiate(OmegaConf.create(node), "only the outer")
    assert made.args == ("only the outer",)
    assert (made.inner.args, made.inner.size) == ((), 7)
    assert made.others["many"] == [datetime.date(2020, 1, 2), 3]
    assert made.others["plain"] == {"deep": fractions.Fraction(1)}


def test_a_nested_component_that_the_caller_replaces_is_not_built() -> None:
    node = {"_component_": "things.Recorder", "inner": {"_component_": "things.failing"}}
    assert instantiate(node, inner="mine").inner == "mine"


def test_references_are_resolved() -> None:
    config = OmegaConf.create(
        {"days": 3, "gap": {"_component_": "datetime.timedelta", "days": "${days}"}}
    )
    assert instantiate(config.gap) == datetime.timedelta(days=3)


def test_none_gives_none() -> None:
    assert instantiate(None) is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("datetime.timedelt", r"`datetime` has no `timedelt`; did you mean `timedelta`\?"),
        ("datetme.timedelta", "no module named `datetme`"),
        ("importlib.metadta.version", "did you mean `metadata`"),
        ("things.Recorder.of_sise", "`things.Recorder` has no `of_sise`; did you mean `of_size`"),
        ("timedelta", "not a dotted path"),
        ("..timedelta", "not a dotted path"),
        ("datetime.time delta", "not a dotted path"),
        ("things.not_callable", "is a int, which cannot be called"),
        ("importlib.metadata", "is a module, which cannot be called"),
    ],
)
def test_a_bad_path_names_the_key_and_the_closest(path: str, message: str) -> None:
    config = OmegaConf.create({"data": {"train": {"_component_": path}}})
    with pytest.raises(UserError, match=message) as caught:
        instantiate(config.data.train)
    assert f"`data.train._component_={path}`" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sorce": "a"}, r"`data.sorce`: .* no parameter `sorce`; did you mean `source`\?"),
        ({"source": "a", "zzz": 1}, "`data.zzz`: .*; there are: source, limit"),
        ({}, "`data` .*missing a required argument: 'source'"),
        ({"source": "a", "limit": -1}, "`data` .*limit must not be negative"),
        ({"source": "a", "limit": "many"}, "`data` .*'<' not supported"),
    ],
)
def test_bad_arguments_name_the_key(arguments: dict[str, Any], message: str) -> None:
    config = OmegaConf.create({"data": {"_component_": "things.strict", **arguments}})
    with pytest.raises(UserError, match=message):
        instantiate(config.data)


def test_a_component_own_user_error_gets_the_key() -> None:
    config = OmegaConf.create({"data": {"_component_": "things.failing", "source": "x"}})
    with pytest.raises(UserError, match="^`data`: source 'x' is empty$"):
        instantiate(config.data)


def test_errors_in_nested_components_name_the_nested_key() -> None:
    nested = [{"_component_": "things.strict", "sorce": 1}]
    config = OmegaConf.create({"data": {"_component_": "things.Recorder", "many": nested}})
    with pytest.raises(UserError, match=r"`data.many\[0\].sorce`"):
        instantiate(config.data)


@pytest.mark.parametrize("node", [{"lr": 1}, {"_component_": 3}, {"_component_": None}])
def test_a_mapping_without_a_path_is_refused(node: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="`_component_` must name a callable"):
        instantiate(node)


def test_a_value_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(UserError, match="must be a mapping with `_component_`; got 3"):
        instantiate(3)  # type: ignore[arg-type]


def test_check_finds_errors_without_calling() -> None:
    Component("things.failing", {"source": "never called"}, "data").check()
    Component("things.strict", {}, "data").check()  # the recipe may add what is missing
    with pytest.raises(UserError, match="did you mean `limit`"):
        Component("things.strict", {"limt": 1}, "data").check()
    with pytest.raises(UserError, match="`data.inner.limt`"):
        inner = {"_component_": "things.strict", "limt": 1}
        Component("things.Recorder", {"inner": inner}, "data").check()


@pytest.mark.parametrize("name", ["with_options", "WithOptions", "partly"])
def test_unpacked_options_are_parameters(name: str) -> None:
    known = Component(f"things.{name}", {"max_length": 3, "split": "train"}, "data")
    known.check()
    with pytest.raises(UserError, match=r"`data.max_lenght`: .*did you mean `max_length`\?"):
        Component(f"things.{name}", {"max_lenght": 3}, "data").check()


def test_options_of_options_and_of_partials_are_given_on() -> None:
    node = {"_component_": "things.partly", "template": "chatml", "split": "train"}
    assert instantiate(node) == ("given", {"template": "chatml", "split": "train"})
    with pytest.raises(UserError, match="did you mean `template`"):
        instantiate({"_component_": "things.partly", "templat": "chatml"})
