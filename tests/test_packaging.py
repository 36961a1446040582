"""The parts at the top of the repository are installed inside the package, and only there."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGE_DIR: dict[str, str] = SETUPTOOLS["package-dir"]
PARTS = ["passes", "recipes", "export", "configs"]


def expected_files(source: Path) -> set[str]:
    """Every Python and YAML file of the packages, by its path in an installation."""
    return {
        f"{package.replace('.', '/')}/{file.relative_to(source / folder).as_posix()}"
        for package, folder in PACKAGE_DIR.items()
        for pattern in ("*.py", "*.yaml")
        for file in (source / folder).rglob(pattern)
    }


def where(cwd: Path, env: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Where a fresh interpreter finds the parts, inside the package and at the top level."""
    code = (
        "import importlib, importlib.util, json\n"
        f"parts = {PARTS!r}\n"
        "found = {'graphtune.' + p: importlib.import_module('graphtune.' + p).__file__ "
        "for p in parts}\n"
        "found |= {p: str(importlib.util.find_spec(p)) for p in parts "
        "if importlib.util.find_spec(p)}\n"
        "from graphtune.config import catalogue\n"
        "found['catalogue'] = ' '.join(catalogue())\n"
        "print(json.dumps(found))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from: a build leaves files in its source folder."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in PACKAGE_DIR.values():
        shutil.copytree(
            ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    family = copy / "configs" / "some_family"
    family.mkdir()
    (family / "1B_lora.yaml").write_text("recipe: sft\n")
    return copy


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, without its dependencies."""
    wheels = tmp_path_factory.mktemp("wheels")
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=300)
    (wheel,) = wheels.glob("graphtune-*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=300)
    return target


def test_wheel_has_every_file_and_nothing_at_the_top_level(source: Path, site: Path) -> None:
    installed = {
        file.relative_to(site).as_posix()
        for pattern in ("*.py", "*.yaml")
        for file in site.rglob(pattern)
    }
    assert installed == expected_files(source)
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} <= {
        "graphtune",
        "bin",
    }
    assert (site / "graphtune" / "py.typed").is_file()


def test_wheel_imports_from_elsewhere(site: Path, tmp_path: Path) -> None:
    found = where(tmp_path, {**os.environ, "PYTHONPATH": str(site)})
    catalogue = (found.pop("catalogue") or "").split()
    assert found == {
        f"graphtune.{part}": str(site / "graphtune" / part / "__init__.py") for part in PARTS
    }
    assert "some_family/1B_lora" in catalogue


def test_editable_install_imports_the_repository(tmp_path: Path) -> None:
    found = where(tmp_path)
    catalogue = (found.pop("catalogue") or "").split()
    assert found == {f"graphtune.{part}": str(ROOT / part / "__init__.py") for part in PARTS}
    names = [path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")]
    assert catalogue == sorted(name.with_suffix("").as_posix() for name in names)
