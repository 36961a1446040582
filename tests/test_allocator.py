"""An installed allocator is preloaded, as a library that says so when it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphtune.allocator import LIBRARIES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")

SOURCE = """
#include <stdio.h>
__attribute__((constructor)) static void say(void) { fputs("preloaded\\n", stderr); }
"""
SCRIPT = """
from graphtune.allocator import allocator_name, preload_allocator
preload_allocator()
print(allocator_name())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the dynamic linker finds an allocator first."""
    folder = tmp_path_factory.mktemp("lib")
    source = folder / "say.c"
    source.write_text(SOURCE)
    compiler = [os.environ.get("CXX", "g++"), "-x", "c", "-shared", "-fPIC"]
    subprocess.run([*compiler, source, "-o", folder / LIBRARIES[0]], check=True)
    kept = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return kept | {"LD_LIBRARY_PATH": str(folder)}


def run(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_command_starts_anew_once(installed: dict[str, str]) -> None:
    done = run(["-c", SCRIPT], installed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "tcmalloc\n", "preloaded\n")


def test_whoever_sets_ld_preload_has_chosen(installed: dict[str, str]) -> None:
    done = run(["-c", SCRIPT], installed | {"LD_PRELOAD": ""})
    assert (done.returncode, done.stdout, done.stderr) == (0, "system\n", "")


@pytest.mark.parametrize("command", ["train", "bench"])
def test_training_has_it(command: str, installed: dict[str, str], tmp_path: Path) -> None:
    done = run(["-m", "graphtune", command, str(tmp_path / "missing.yaml")], installed)
    assert done.returncode == 2
    assert done.stderr.startswith("preloaded\n")
    assert done.stderr.count("preloaded") == 1
    assert "missing.yaml" in done.stderr  # what the command was given


def test_other_commands_start_at_once(installed: dict[str, str]) -> None:
    assert "preloaded" not in run(["-m", "graphtune", "ls"], installed).stderr
