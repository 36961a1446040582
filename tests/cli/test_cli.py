"""The command line: what it prints, where, and the exit code."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

import graphtune.recipes
from graphtune.cli import app, main
from graphtune.config import SCHEMAS, Component, compose

CONFIG = """\
recipe: stand_in
output_dir: runs/x      # a comment
model: {id: some/model}
dataset: {_component_: fractions.Fraction}
"""

RECIPE = """
from graphtune.errors import UserError

def run(config):
    behaviour = config.get("behaviour", "print")
    if behaviour == "print":
        print("ran with seed", config.get("seed"))
    if behaviour == "refuse":
        raise UserError("`behaviour=refuse`:\\n  not this one")
    if behaviour == "break":
        raise RuntimeError("first line\\nsecond line")
    if behaviour == "interrupt":
        raise KeyboardInterrupt
"""


@dataclass(frozen=True)
class StandIn:
    """A recipe with a schema of its own."""

    recipe: str
    output_dir: str
    model: dict[str, Any]
    dataset: Component


class Result(NamedTuple):
    code: int | str
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder, a catalogue with one config, and a recipe called stand_in."""
    for name in ("work", "shelf/family", "recipes"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "shelf" / "family" / "small.yaml").write_text(CONFIG)
    (tmp_path / "recipes" / "stand_in.py").write_text(RECIPE)
    monkeypatch.setattr(compose, "files", lambda package: tmp_path / "shelf")
    monkeypatch.setitem(SCHEMAS, "stand_in", StandIn)
    monkeypatch.chdir(tmp_path / "work")
    graphtune.recipes.__path__.append(str(tmp_path / "recipes"))
    yield tmp_path / "work"
    graphtune.recipes.__path__.pop()
    sys.modules.pop("graphtune.recipes.stand_in", None)


@pytest.fixture
def call(folder: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*words: str) -> Result:
        with pytest.raises(SystemExit) as stopped:
            main(words)
        captured = capsys.readouterr()
        return Result(stopped.value.code or 0, captured.out, captured.err)

    return run


def test_the_installed_command_is_main() -> None:
    (script,) = entry_points(group="console_scripts", name="graphtune")
    assert script.load() is main


COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(call: Call, command: str) -> None:
    assert command in call("--help").out
    shown = call(command, "--help")
    assert shown.code == 0
    assert f"Example: graphtune {command} " in shown.out.replace("\n", " ") + " "


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, graphtune.cli\ntry: graphtune.cli.main(['train', '--help'])\n"
        "except SystemExit: sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_train_runs_the_recipe_of_the_config(call: Call) -> None:
    result = call("train", "family/small", "seed=3", "~dataset")
    assert (result.code, result.out, result.err) == (0, "ran with seed 3\n", "")


def test_code_of_others_is_told_before_it_runs(call: Call) -> None:
    result = call("train", "family/small")
    assert (result.code, result.out) == (0, "ran with seed None\n")
    told = "`dataset` runs fractions.Fraction, which is not part of graphtune or torch"
    assert result.err == f"graphtune: {told}\n"


def test_user_errors_are_one_line(call: Call) -> None:
    result = call("train", "family/small", "behaviour=refuse", "~dataset")
    assert result.code == 2
    assert result.out == ""
    assert result.err == "graphtune: error: `behaviour=refuse`: not this one\n"


def test_other_errors_are_one_line_with_a_hint(call: Call) -> None:
    result = call("train", "family/small", "behaviour=break", "~dataset")
    assert result.code == 1
    expected = "graphtune: error: RuntimeError: first line (--debug shows the traceback)\n"
    assert result.err == expected


@pytest.mark.parametrize(("behaviour", "code"), [("refuse", 2), ("break", 1)])
@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_debug_shows_the_traceback(call: Call, behaviour: str, code: int, place: str) -> None:
    words = ["train", "family/small", f"behaviour={behaviour}"]
    words.insert({"before": 0, "between": 1, "after": 3}[place], "--debug")
    result = call(*words)
    assert result.code == code
    assert "Traceback (most recent call last)" in result.err
    assert "stand_in.py" in result.err
    assert result.err.splitlines()[-1].startswith("graphtune: error: ")


def test_an_interrupt_ends_with_130(call: Call) -> None:
    result = call("train", "family/small", "behaviour=interrupt")
    assert result.code == 130
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "family/smal"], "did you mean `family/small`?"),
        (["train", "family/small", "recipe=stand_im"], "did you mean `stand_in`?"),
        (["train", "family/small", "~recipe"], "missing `recipe`: one of "),
        (["train", "family/small", "--seed", "3"], "set without dashes: `seed=value`"),
        (["train", "--seed=3", "family/small"], "set without dashes: `seed=3`"),
        (["cat", "family/smal"], "did you mean `family/small`?"),
        (["validate", "family/small", "recipe=sftt"], "did you mean `sft`?"),
        (["validate", "family/small", "recipe=sft", "sed=1"], "did you mean `seed`?"),
        (["validate", "family/small", "recipe=sft", "passes.lorra={}"], "did you mean `lora`?"),
        (
            ["validate", "family/small", "recipe=sft", "passes.lora.rnk=1"],
            "did you mean `passes.lora.rank`?",
        ),
        (["validate", "family/small", "recipe=sft", "dataset.numeratr=1"], "`numerator`?"),
    ],
)
def test_bad_input_is_one_line_and_2(call: Call, words: list[str], message: str) -> None:
    result = call(*words)
    assert result.code == 2
    assert result.out == ""
    assert message in result.err
    assert result.err.startswith("graphtune: error: ")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("words", [["trian"], ["train"], ["cp", "family/small"]])
def test_wrong_usage_is_2(call: Call, words: list[str]) -> None:
    assert call(*words).code == 2


def test_validate_says_what_it_checked(call: Call) -> None:
    result = call("validate", "family/small", "dataset.numerator=3")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "config        keys, types and values of the recipe stand_in"
    assert "dataset fractions.Fraction" in lines[1]
    assert lines[2].startswith("foreign code  `dataset` runs fractions.Fraction")
    assert lines[-1] == "family/small: valid"
    report = json.loads(call("validate", "family/small", "--json").out)
    assert report["valid"] is True
    assert [check["name"] for check in report["checks"]] == ["config", "components", "foreign code"]
    assert all(check["checked"] for check in report["checks"])


def test_ls_lists_configs(call: Call) -> None:
    lines = [line.split() for line in call("ls").out.splitlines()]
    assert lines[0] == ["CONFIG", "RECIPE", "MODEL"]
    assert ["family/small", "stand_in", "some/model"] in lines


def test_ls_for_a_machine(call: Call) -> None:
    listed = json.loads(call("ls", "--json").out)
    assert listed["configs"] == [
        {"config": "family/small", "recipe": "stand_in", "model": "some/model"}
    ]
    assert listed["techniques"] == []
    assert {"sft", "stand_in"} <= set(listed["recipes"])


def test_cat_prints_the_file_as_it_is(call: Call) -> None:
    assert call("cat", "family/small").out == CONFIG


@pytest.mark.parametrize(
    ("destination", "file"),
    [("mine.yaml", "mine.yaml"), ("mine", "mine.yaml"), (".", "small.yaml"), ("v1.2", "v1.2.yaml")],
)
def test_cp_copies(call: Call, folder: Path, destination: str, file: str) -> None:
    result = call("cp", "family/small", destination)
    assert result.code == 0
    assert result.out == f"Copied family/small to {file}\n"
    assert (folder / file).read_text() == CONFIG


def test_cp_overwrites_only_by_force(call: Call, folder: Path) -> None:
    (folder / "mine.yaml").write_text("mine")
    result = call("cp", "family/small", "mine.yaml")
    assert result.code == 2
    assert "`mine.yaml` exists; --force overwrites it" in result.err
    assert (folder / "mine.yaml").read_text() == "mine"
    assert call("cp", "--force", "family/small", "mine.yaml").code == 0
    assert (folder / "mine.yaml").read_text() == CONFIG


def test_cp_makes_folders_only_if_asked(call: Call, folder: Path) -> None:
    result = call("cp", "family/small", "a/b/mine.yaml")
    assert result.code == 2
    assert "--make-parents creates it" in result.err
    assert call("cp", "family/small", "a/b/mine.yaml", "--make-parents").code == 0
    assert (folder / "a" / "b" / "mine.yaml").read_text() == CONFIG
