"""A config is checked against dataclasses: right ones pass unchanged, wrong ones are explained."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from graphtune.config import (
    Component,
    SFTConfig,
    check_options,
    load_config,
    option,
    to_yaml,
    validate,
)
from graphtune.errors import UserError

MINIMAL: dict[str, Any] = {
    "output_dir": "runs/x",
    "model": {"id": "some/model"},
    "dataset": {"_component_": "datetime.timedelta", "days": 1},
}


def check(**changes: Any) -> SFTConfig:
    return validate(OmegaConf.create({**MINIMAL, **changes}))


@dataclass(frozen=True)
class Inner:
    width: int = option("of the thing", 1, at_least=1)
    scale: float = option("by which", 1.0)


@dataclass(frozen=True)
class Options:
    """One field of every kind that a schema or a pass may have."""

    needed: str
    whole: int = 1
    number: float = 1.0
    flag: bool = False
    maybe: int | None = None
    mode: Literal["selective", "full"] = "full"
    targets: tuple[str, ...] = ("all-linear",)
    pair: tuple[float, float] = (0.9, 0.99)
    words: list[str] | str = "one"
    table: dict[str, int] = dataclasses.field(default_factory=dict)
    inner: Inner = dataclasses.field(default_factory=Inner)
    many: list[Inner] = dataclasses.field(default_factory=list)
    part: Inner | Component | None = None

    def __post_init__(self) -> None:
        if self.whole == 13:
            raise ValueError("13 is unlucky")
        if self.whole == 7:
            raise UserError("`passes.thing.whole=7` is odd")


def options(**given: Any) -> Options:
    return check_options(Options, {"needed": "x", **given}, "passes.thing")


def test_right_values_make_an_instance() -> None:
    made = options(
        number=3,
        maybe=None,
        mode="selective",
        targets=["a", "b"],
        pair=[1, 2],
        words=["x"],
        table={"a": 1},
        inner={"width": 4},
        many=[{"width": 2}, {}],
        part={"_component_": "datetime.timedelta", "days": 1},
    )
    assert made == Options(
        needed="x",
        number=3.0,
        mode="selective",
        targets=("a", "b"),
        pair=(1.0, 2.0),
        words=["x"],
        table={"a": 1},
        inner=Inner(width=4),
        many=[Inner(2), Inner()],
        part=Component("datetime.timedelta", {"days": 1}),
    )
    assert isinstance(made.number, float)
    assert options(part={"width": 2}).part == Inner(2)
    assert options(words="x").words == "x"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"wohle": 3}, r"unknown key `passes.thing.wohle=3`; did you mean `passes.thing.whole`\?"),
        ({"width": 3}, r"`passes.thing.width=3`; did you mean `passes.thing.inner.width`\?"),
        ({"zzz": "a"}, "`passes.thing.zzz=a`; there are: needed, whole"),
        ({"inner": {"widht": 1}}, "did you mean `passes.thing.inner.width`"),
        ({"many": [{}, {"widht": 1}]}, r"`passes.thing.many\[1\].widht=1`"),
        ({"part": {"widht": 1}}, "did you mean `passes.thing.part.width`"),
        ({"needed": None}, "`passes.thing.needed=null` must be text"),
        ({"needed": 7}, r"`passes.thing.needed=7` must be text \(in quotes\)"),
        ({"whole": 1.0}, "`passes.thing.whole=1.0` must be a whole number"),
        ({"whole": True}, "`passes.thing.whole=true` must be a whole number"),
        ({"whole": "3"}, "`passes.thing.whole=3` must be a whole number"),
        ({"number": "fast"}, "must be a number"),
        ({"number": False}, "must be a number"),
        ({"flag": 1}, "must be true or false"),
        ({"flag": "yes"}, "must be true or false"),
        ({"maybe": "x"}, "must be a whole number"),
        ({"mode": "selectiv"}, r"one of selective, full; did you mean `selective`\?"),
        ({"mode": None}, "must be one of selective, full"),
        ({"targets": "a"}, r"must be a list of text, such as \[a\]"),
        ({"targets": [1]}, r"`passes.thing.targets\[0\]=1` must be text"),
        ({"pair": [1, 2, 3]}, "must have 2 values"),
        ({"words": 3}, "must be a list of text or text"),
        ({"table": {"a": "b"}}, "`passes.thing.table.a=b` must be a whole number"),
        ({"table": [1]}, "must be a mapping"),
        ({"inner": 3}, "must be a mapping"),
        ({"inner": {"width": 0}}, "`passes.thing.inner.width=0` must be at least 1"),
        ({"part": 3}, "must be a mapping or a dotted path"),
        ({"whole": 13}, "^`passes.thing`: 13 is unlucky"),
    ],
)
def test_wrong_options_are_explained(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        options(**given)


def test_a_missing_option_is_named() -> None:
    with pytest.raises(UserError, match="missing `passes.thing.needed`"):
        check_options(Options, {}, "passes.thing")


def test_a_minimal_config_gets_the_defaults() -> None:
    config = check()
    assert config == SFTConfig(
        output_dir="runs/x",
        model=dataclasses.replace(config.model, id="some/model"),
        dataset=Component("datetime.timedelta", {"days": 1}),
    )
    assert config.optimizer == Component("torch.optim.AdamW", {"lr": 3e-4})


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"lr": 1e-4}, Component("torch.optim.AdamW", {"lr": 1e-4})),
        ({"eps": 1e-6}, Component("torch.optim.AdamW", {"lr": 3e-4, "eps": 1e-6})),
        ("torch.optim.SGD", Component("torch.optim.SGD")),
        ({"_component_": "torch.optim.SGD"}, Component("torch.optim.SGD")),
    ],
)
def test_the_default_optimizer_changes_key_by_key(optimizer: Any, expected: Component) -> None:
    assert check(optimizer=optimizer).optimizer == expected


@pytest.mark.parametrize("key", ["output_dir", "dataset", "model"])
def test_required_keys(key: str) -> None:
    given = {name: value for name, value in MINIMAL.items() if name != key}
    with pytest.raises(UserError, match=f"missing `{key}"):
        validate(OmegaConf.create(given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": {"id": "x"}}, r"unknown key `modle=.*`; did you mean `model`\?"),
        ({"batch_size": 4}, r"did you mean `loader.batch_size`\?"),
        ({"model": {"id": "x", "revison": "v1"}}, r"did you mean `model.revision`\?"),
        ({"epochs": "${nope}"}, "`epochs`: Interpolation key 'nope' not found"),
        ({"output_dir": "???"}, "`output_dir`: Missing mandatory value"),
        ({"optimizer": {"lrr": 1}}, r"`optimizer.lrr`: .* did you mean `lr`\?"),
        ({"optimizer": "torch.optim.AdamWW"}, "did you mean `AdamW`"),
        ({"dataset_val": 3}, "`dataset_val=3` must be a dotted path"),
        ({"passes": {"lora": 3}}, "`passes.lora=3` must be a mapping"),
    ],
)
def test_wrong_configs_are_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(**changes)


def test_passes_are_checked_against_the_registry() -> None:
    registry = {"thing": Options, "empty": Inner}

    def with_passes(**passes: Any) -> SFTConfig:
        config = OmegaConf.create({**MINIMAL, "passes": passes})
        return validate(config, SFTConfig, registry)

    assert with_passes(thing={"needed": "a"}).passes == {"thing": {"needed": "a"}}
    with pytest.raises(UserError, match=r"unknown pass `passes.thign`; did you mean `thing`\?"):
        with_passes(thign={})
    with pytest.raises(UserError, match="missing `passes.thing.needed`"):
        with_passes(thing={})
    assert with_passes(empty=None).passes == {"empty": None}
    dotted = {"graphtune.passes.LoRA": {"rank": "x"}}
    with pytest.raises(UserError, match="LoRA.rank=x` must be a whole number"):
        with_passes(**dotted)
    with pytest.raises(UserError, match="`passes.fractions.Fraction`: .* is not a dataclass"):
        with_passes(**{"fractions.Fraction": {}})


def test_an_error_that_names_its_key_is_left_as_it_is() -> None:
    with pytest.raises(UserError, match=r"^`passes.thing.whole=7` is odd$"):
        options(whole=7)


def test_messages_are_one_line() -> None:
    with pytest.raises(UserError) as caught:
        check(model={"id": "a\nb\n" * 100, "dtype": "a\nb\n" * 100})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@given(
    seed=st.integers(min_value=0),
    clip=st.none() | st.floats(min_value=0, allow_infinity=False),
    name=st.text(st.characters(codec="ascii", exclude_characters="$\\\r\x7f"), min_size=1).filter(
        lambda text: text.isprintable() and text != "???"
    ),
    schedule=st.none()
    | st.just({"name": "linear", "warmup_steps": 3})
    | st.just({"_component_": "torch.optim.lr_scheduler.StepLR", "step_size": 2}),
)
def test_a_written_config_reads_back_the_same(
    seed: int, clip: float | None, name: str, schedule: Any, tmp_path_factory: Any
) -> None:
    config = check(seed=seed, clip_grad_norm=clip, output_dir=name, lr_scheduler=schedule)
    file: Path = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(to_yaml(config))
    assert validate(load_config(str(file))) == config
