"""Configs are found, and overrides do what they say."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from graphtune.config import catalogue, compose, load_config
from graphtune.errors import UserError

TEXT = """\
seed: 1
name: run-${seed}
model: {id: some/model, dtype: auto}
passes:
  lora: {rank: 8, targets: ["*.q_proj", "*.v_proj"]}
optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue of two configs."""
    folder = tmp_path / "shelf"
    (folder / "llama3_2").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "quickstart.yaml").write_text("recipe: sft\n")
    (folder / "llama3_2" / "1B_lora.yaml").write_text("recipe: dpo\n")
    monkeypatch.setattr(compose, "files", lambda package: folder)
    return folder


def get(file: str, *overrides: str) -> object:
    return OmegaConf.to_container(load_config(file, overrides), resolve=True)


def test_a_file_is_read_as_yaml(file: str) -> None:
    config = get(file)
    assert config == {
        "seed": 1,
        "name": "run-1",
        "model": {"id": "some/model", "dtype": "auto"},
        "passes": {"lora": {"rank": 8, "targets": ["*.q_proj", "*.v_proj"]}},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 3e-4},
    }


@pytest.mark.parametrize(
    "name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml", "configs/quickstart"]
)
def test_catalogued_names(name: str, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf.parent)
    assert list(catalogue()) == ["llama3_2/1B_lora", "quickstart"]
    assert load_config(name).recipe == "sft"
    assert load_config("llama3_2/1B_lora").recipe == "dpo"


def test_a_file_goes_before_the_catalogue(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf.parent)
    (shelf.parent / "configs").mkdir()
    (shelf.parent / "configs" / "quickstart.yaml").write_text("recipe: mine\n")
    assert load_config("configs/quickstart.yaml").recipe == "mine"
    assert load_config("quickstart").recipe == "sft"


def test_an_unknown_name_gets_the_closest(shelf: Path) -> None:
    with pytest.raises(UserError, match=r"`quikstart`.*did you mean `quickstart`\?"):
        load_config("quikstart")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [}\n", "line 2 is not valid YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("a: ${b\n", "cannot be read"),
        ("a: 1\na: 2\n", "duplicate key"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path / "bad.yaml"))


def test_an_empty_file_is_an_empty_config(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert get(str(tmp_path / "empty.yaml"), "seed=3") == {"seed": 3}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=2", "seed", 2),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("passes.lora.targets=[a, b]", "passes.lora.targets", ["a", "b"]),
        ("passes.lora.targets.1=z", "passes.lora.targets", ["*.q_proj", "z"]),
        ("passes.lora.alpha=4", "passes.lora.rank", 8),
        ("passes.merge={}", "passes.lora.rank", 8),
        ("passes={merge: {}}", "passes.lora.rank", 8),
        ("model.filter=a=b", "model.filter", "a=b"),
        ("new.deep.key=yes", "new.deep.key", True),
        ("model.id=None", "model.id", None),
        ("model.id=null", "model.id", None),
        ("model.id=", "model.id", None),
        ('model.id="None"', "model.id", "None"),
        ("model.id='7'", "model.id", "7"),
    ],
)
def test_an_override_sets_its_key_and_no_other(
    file: str, override: str, key: str, value: object
) -> None:
    config = load_config(file, [override])
    found = OmegaConf.select(config, key)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # no `$` (references), and nothing that a terminal could not pass
    | st.text(st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters="$\\")),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(value=json_values)
def test_any_json_value_arrives_as_it_is(
    value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "json.yaml"
    file.write_text("a: {b: 1}\n")
    assert get(str(file), f"a.b={json.dumps(value)}") == {"a": {"b": value}}


def test_a_reference_follows_an_override(file: str) -> None:
    assert load_config(file, ["seed=5"]).name == "run-5"
    assert load_config(file, ["passes.lora.rank=${seed}", "seed=6"]).passes.lora.rank == 6


def test_a_bare_name_on_a_component_replaces_only_its_path(file: str) -> None:
    config = load_config(file, ["optimizer=torch.optim.SGD"])
    assert config.optimizer == {"_component_": "torch.optim.SGD", "lr": 3e-4}
    assert load_config(file, ["optimizer=null"]).optimizer is None
    assert load_config(file, ["model.id=torch.optim.SGD"]).model.id == "torch.optim.SGD"


def test_a_tilde_removes(file: str) -> None:
    assert "passes" not in load_config(file, ["~passes"])
    assert load_config(file, ["~passes.lora"]).passes == {}
    assert load_config(file, ["~optimizer.lr"]).optimizer == {"_component_": "torch.optim.AdamW"}


def test_overrides_apply_in_their_order(file: str) -> None:
    config = load_config(file, ["~passes.lora", "passes.lora.rank=2", "seed=1", "seed=2"])
    assert config.passes == {"lora": {"rank": 2}}
    assert config.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("~passes.lorra", r"`passes.lorra`: no such key; did you mean `~passes.lora`\?"),
        ("~seed.deeper", "no such key"),
        ("~", "no such key"),
        ("--lr=1e-4", "set without dashes: `lr=1e-4`"),
        ("--optimizer.lr", "set without dashes: `optimizer.lr=value`"),
        ("seed", "must read `key=value`"),
        ("=3", "must read `key=value`"),
        ("seed=[1,", r"`\[1,` is not valid YAML"),
        ("seed=${nope", "override `seed="),
        ("passes.lora.targets.9=a", "override `passes.lora.targets.9=a`"),
    ],
)
def test_a_bad_override_is_refused(file: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(file, [override])
