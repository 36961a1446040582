"""An export is there whole, with a manifest that tells the truth, or what was there stays."""

import hashlib
import json

import pytest
import torch
import transformers

import graphtune as gt
from graphtune.errors import UserError
from graphtune.export.artifact import artifact, read_checks, read_manifest
from graphtune.passes import LoRA, Merge
from tests.oracles.models import tiny_model

ONES = torch.ones(1, 2, 3)


@pytest.fixture(scope="module")
def program():
    return gt.capture(tiny_model("llama")).apply(LoRA(rank=2)).apply(Merge())


def write(folder, program, text="new", **options):
    with artifact(folder, "test", program, **options) as made:
        (made.path / "sub").mkdir()
        (made.path / "sub" / "a.txt").write_text(text)
        made.check("itself", ONES, ONES)
    return folder


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_manifest_tells_files_source_versions_and_checks(program, tmp_path):
    folder = write(tmp_path / "out", program, run="runs/one")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == {
        "sub/a.txt": {"sha256": hashlib.sha256(b"new").hexdigest(), "bytes": 3}
    }
    assert manifest["source"]["run"] == "runs/one"
    assert [one["name"] for one in manifest["source"]["passes"]] == ["lora", "merge"]
    assert manifest["source"]["passes"][0]["options"]["rank"] == 2
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["transformers"] == transformers.__version__
    (check,) = read_checks(folder)
    assert (check.what, check.max_abs_diff, check.max_abs_logit) == ("itself", 0, 1)
    assert check.limit == 1e-4
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("found", "scale", "tolerance", "kept"),
    [
        (ONES + 9e-5, 1, None, True),
        (ONES + 2e-4, 1, None, False),
        (ONES * float("nan"), 1, None, False),
        (ONES * 30 + 2e-4, 30, None, True),  # allowed more where logits are larger
        (ONES * 30 + 4e-4, 30, None, False),
        (ONES.bfloat16() + 2**-7, torch.ones((), dtype=torch.bfloat16), None, True),
        (ONES + 2e-4, 1, 1e-3, True),
        (ONES[:, :1], 1, None, False),
    ],
)
def test_an_export_that_disagrees_is_not_kept(found, scale, tolerance, kept, program, tmp_path):
    def export():
        with artifact(tmp_path / "out", "test", program) as made:
            made.check("it", found, ONES.to(found.dtype) * scale, tolerance)

    if kept:
        export()
    else:
        with pytest.raises(RuntimeError, match="it .*nothing was kept"):
            export()
    assert (tmp_path / "out").exists() == kept
    assert len(list(tmp_path.iterdir())) == kept


def test_what_is_there_is_replaced_only_if_asked(program, tmp_path):
    folder = write(tmp_path / "out", program)
    before = content(folder)
    with pytest.raises(UserError, match="is not empty.*--overwrite"):
        write(folder, program, "newer")
    assert content(folder) == before
    write(folder, program, "newer", overwrite=True)
    assert (folder / "sub" / "a.txt").read_text() == "newer"
    assert read_manifest(folder)["files"]["sub/a.txt"]["bytes"] == 5
    assert list(tmp_path.iterdir()) == [folder]


def test_overwriting_never_loses_what_no_export_wrote(program, tmp_path):
    folder = write(tmp_path / "out", program)
    (folder / "notes.txt").write_text("mine")
    before = content(folder)
    with pytest.raises(UserError, match=r"holds 'notes.txt', which no manifest"):
        write(folder, program, "newer", overwrite=True)
    assert content(folder) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text("[]")  # of something else
    with pytest.raises(UserError, match="manifest.json"):
        write(other, program, overwrite=True)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failure_leaves_what_was_there(error, raised, program, tmp_path):
    folder = write(tmp_path / "out", program)
    before = content(folder)
    with pytest.raises(raised), artifact(folder, "t", program, overwrite=True) as made:
        (made.path / "half").write_text("written")
        raise error
    assert content(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failure_of_the_last_step_leaves_what_was_there(program, tmp_path, monkeypatch):
    folder = write(tmp_path / "out", program)
    before = content(folder)
    rename = type(folder).rename

    def failing(self, target):
        if ".partial-" in self.name:
            raise OSError("the disk went away")
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", failing)
    with pytest.raises(OSError, match="went away"):
        write(folder, program, "newer", overwrite=True)
    assert content(folder) == before
    assert list(tmp_path.iterdir()) == [folder]
