"""What all targets share: a folder that appears whole, its check by running it, its manifest."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from graphtune.errors import UserError

MANIFEST = "manifest.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, largest file

# Largest difference of a logit, where logits reach 10, by the dtype that the program computes in:
# about 100 units in the last place of such a logit in float32, 1 in the others.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Check:
    """One comparison of what was written with the program; differences are of logits.

    Attributes:
        what: what was run.
        max_abs_diff: largest |difference|.
        max_abs_logit: largest |logit|, for scale.
        limit: the difference above which the export is refused; None where it is only measured.
    """

    what: str
    max_abs_diff: float
    max_abs_logit: float
    limit: float | None

    def __str__(self) -> str:
        bound = "" if self.limit is None else f", at most {self.limit:.3g} allowed"
        return (
            f"{self.what}: logits differ by at most {self.max_abs_diff:.2g} "
            f"(they reach {self.max_abs_logit:.3g}{bound})"
        )


class Artifact:
    """An export under construction.

    Attributes:
        path: the temporary folder to write into.
        facts: what else the manifest will say.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self._about = about
        self._checks: list[Check] = []

    def check(
        self, what: str, found: Tensor, expected: Tensor, tolerance: float | None = None
    ) -> None:
        """Compare logits; see `check_difference`."""
        if found.shape != expected.shape:
            raise RuntimeError(
                f"{what} gives logits of shape {tuple(found.shape)}, the program "
                f"{tuple(expected.shape)}; nothing was kept"
            )
        found, reference = found.float().cpu(), expected.float().cpu()
        difference = (found - reference).abs().max().item()
        if tolerance is None:
            tolerance = default_tolerance(expected.dtype)
        self.check_difference(what, difference, reference.abs().max().item(), tolerance)

    def check_difference(
        self, what: str, difference: float, largest: float, tolerance: float, share: float = 0.0
    ) -> None:
        """Keep the export only if it agrees with the program.

        Two programs that sum in another order differ too, by more the larger the logits: where
        these reach 30, eager float32 is itself about 1e-4 from float64. Therefore `tolerance`
        holds as it is for logits up to 10, and is scaled by their size above. `share` of the
        largest logit is allowed in any case.

        Raises:
            RuntimeError: the difference is larger, or not a number.
        """
        limit = max(tolerance * max(1.0, largest / 10), share * largest)
        if not difference < limit:  # NaN is not less
            raise RuntimeError(
                f"{what} disagrees with the program: a logit differs by {difference:.3g}, not "
                f"below {limit:.3g} (tolerance {tolerance:g}; logits reach {largest:.3g}); "
                "nothing was kept"
            )
        self._checks.append(Check(what, difference, largest, limit))

    def measure(self, what: str, found: Tensor, expected: Tensor) -> None:
        """Record a difference that is meant to be there, such as that of rounding weights."""
        difference = (found.float() - expected.float()).abs().max().item()
        largest = expected.float().abs().max().item()
        self._checks.append(Check(what, difference, largest, None))

    def _write_manifest(self) -> None:
        manifest = {
            **self._about,
            "files": {name: fingerprint(self.path / name) for name in _files(self.path)},
            "checks": [asdict(check) for check in self._checks],
            **self.facts,
        }
        (self.path / MANIFEST).write_text(json.dumps(manifest, indent=2, default=str) + "\n")


@contextmanager
def artifact(
    out_dir: str | Path,
    target: str,
    program: nn.Module,
    *,
    packages: tuple[str, ...] = ("torch", "transformers"),
    overwrite: bool = False,
    run: str | None = None,
) -> Iterator[Artifact]:
    """A folder to fill, which takes its place, with a manifest, once it is complete.

    Args:
        out_dir: must be missing or empty, or an earlier export if `overwrite`, which is kept
            until the new one is there.
        target: its name, for the manifest.
        program: what is exported.
        packages: whose versions the manifest records.
        overwrite: replace an earlier export.
        run: the training run that the program is from, for the manifest.

    Raises:
        UserError: `out_dir` holds something that may not be replaced.
    """
    folder = Path(out_dir).absolute()
    _check_free(folder, overwrite)
    info = getattr(program, "info", None)
    about = {
        "target": target,
        "source": {
            "run": run,
            "model": getattr(info, "source", None),
            "fingerprint": getattr(info, "fingerprint", None),
            "passes": [
                {"name": row.name, "options": dict(row.options)}
                for row in getattr(program, "ledger", ())
            ],
        },
        "versions": {name: importlib.metadata.version(name) for name in ("graphtune", *packages)},
    }
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        made = Artifact(partial, about)
        yield made
        made._write_manifest()
        _put(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise UserError(
                f"`out_dir={folder}`: the export does not fit there ({error.strerror}); nothing "
                "was kept; make room, or name a folder on another disk"
            ) from error
        raise


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an export."""
    return json.loads((Path(folder) / MANIFEST).read_text())


def read_checks(folder: str | Path) -> list[Check]:
    """What was checked of an export when it was made."""
    return [Check(**check) for check in read_manifest(folder)["checks"]]


def fingerprint(path: Path) -> dict[str, Any]:
    """SHA-256, in hexadecimal, and size of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"`out_dir={folder}` is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"`out_dir={folder}` is not empty; name a new folder, or replace the export that lies "
            "there with overwrite=True (--overwrite)"
        )
    # Never more than what an export wrote: the folder may be anyone's.
    try:
        known = {*read_manifest(folder)["files"], MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    if foreign := [name for name in _files(folder) if name not in known]:
        raise UserError(
            f"`out_dir={folder}` holds {foreign[0]!r}, which no manifest.json there lists, so that "
            "overwriting would lose it; name a new folder"
        )


def _put(partial: Path, folder: Path) -> None:
    """Let a complete folder take its place; what was there is removed last."""
    if not folder.exists():
        partial.rename(folder)
        return
    former = folder.with_name(f".{folder.name}.former-{os.getpid()}")
    folder.rename(former)
    try:
        partial.rename(folder)
    except BaseException:
        former.rename(folder)
        raise
    shutil.rmtree(former)


# ---------------------------------------------------------------------------- running


def default_tolerance(dtype: torch.dtype) -> float:
    """Largest difference of a logit that two ways to compute the same may have."""
    return _TOLERANCES[dtype]


@contextmanager
def evaluating(program: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; the program is left as it was."""
    was_training = program.training
    program.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        program.train(was_training)


def logits(model: nn.Module, *inputs: Tensor) -> Tensor:
    """Logits (batch, seq, vocab) of a program or a model of transformers, in eval mode."""
    device = next(model.parameters()).device
    with evaluating(model):
        out = model(*(tensor.to(device) for tensor in inputs))
    return out if isinstance(out, Tensor) else out.logits


_PROBE = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all."


def probe_ids(
    program: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, length: int = 32
) -> Tensor:
    """Token ids, int64 (1, seq), to compare on: a text, or ids spread over the vocabulary.

    Args:
        length: most tokens; fewer where the model has not as many positions.
    """
    config = getattr(program, "config", None)
    text_config = config.get_text_config() if config is not None else None
    length = min(length, getattr(text_config, "max_position_embeddings", None) or length)
    vocab_size = getattr(text_config, "vocab_size", None) or 2
    if tokenizer is not None:
        ids = torch.tensor(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
        if ids.numel() and int(ids.max()) < vocab_size:
            return ids.repeat(-(-length // ids.numel()))[None, :length].contiguous()
    return ((torch.arange(length) * 7919 + 1) % vocab_size)[None]
