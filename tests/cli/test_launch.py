"""torchrun's options before CONFIG start processes; a stand-in recipe counts its ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphtune.cli.launch import split_off_options
from graphtune.errors import UserError

# Makes a recipe known in every process: Python runs `sitecustomize` before anything else.
SITE = """
import importlib.util, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "graphtune.recipes.counting":
            return importlib.util.spec_from_file_location(name, {recipe!r})

sys.meta_path.insert(0, Finder())
from graphtune.config import SCHEMAS
SCHEMAS["counting"] = SCHEMAS["sft"]
"""
RECIPE = """
import os, sys
from pathlib import Path
from graphtune.errors import UserError

DISTRIBUTED = {distributed}

def run(config):
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    Path(config.folder, f"rank_{{rank}}_of_{{world}}_{{config.get('word')}}").touch()
    if config.get("refuse") is not None and str(config.refuse) == rank:
        raise UserError("`refuse`: not this one")
    if config.get("exit") is not None and rank == "0":
        raise RuntimeError("it broke")
"""


def train(folder: Path, *words: str, distributed: bool = True) -> tuple[int, str, list[str]]:
    """Exit code, what was said, and the ranks that have run."""
    (folder / "ranks").mkdir()
    (folder / "recipe.py").write_text(RECIPE.format(distributed=distributed))
    (folder / "sitecustomize.py").write_text(SITE.format(recipe=str(folder / "recipe.py")))
    (folder / "config.yaml").write_text(f"recipe: counting\nfolder: {folder / 'ranks'}\n")
    result = subprocess.run(
        [sys.executable, "-m", "graphtune", "train", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    ran = sorted(path.name for path in (folder / "ranks").iterdir())
    return result.returncode, result.stderr, ran


@pytest.mark.slow
def test_each_process_runs_the_recipe(tmp_path: Path) -> None:
    code, said, ran = train(tmp_path, "--nproc-per-node", "2", "config.yaml", "word=a=b")
    assert (code, ran) == (0, ["rank_0_of_2_a=b", "rank_1_of_2_a=b"]), said


@pytest.mark.slow
@pytest.mark.parametrize(("word", "code"), [("refuse=1", 2), ("exit=1", 1)])
def test_the_exit_code_is_the_first_failures(tmp_path: Path, word: str, code: int) -> None:
    found, said, _ = train(tmp_path, "--nproc-per-node=2", "config.yaml", word)
    assert found == code, said
    assert ("not this one" if code == 2 else "it broke") in said


def test_a_recipe_for_one_process_refuses_several(tmp_path: Path) -> None:
    words = ("--nproc-per-node", "2", "config.yaml")
    code, said, ran = train(tmp_path, *words, distributed=False)
    assert (code, ran) == (2, [])
    assert "`recipe=counting` trains in one process so far, not in 2" in said


def test_options_are_torchruns_own() -> None:
    options, words = split_off_options(
        ["--nnodes", "2", "--nproc_per_node=4", "--rdzv-endpoint", "host:1", "c.yaml", "--x", "a=1"]
    )
    assert options is not None
    assert (options.processes, options.torchrun.rdzv_endpoint) == (8, "host:1")
    assert words == ["c.yaml", "--x", "a=1"]
    assert split_off_options(["c.yaml", "--nnodes"]) == (None, ["c.yaml", "--nnodes"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed=3", "c.yaml"], "unknown option `--seed=3`.*without dashes: `seed=3`"),
        (["--nproc-per-node", "2"], "training_script"),
        (["--nproc-per-node", "two", "c.yaml"], "two"),
        (["--node-rank", "two", "c.yaml"], "invalid int value: 'two'"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_off_options(words)
