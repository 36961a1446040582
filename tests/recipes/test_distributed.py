"""Runs on two ranks are, up to rounding, the run in one process with the same global batch."""

import pytest
import torch

from tests.oracles.command_line import changed, graphtune, lines, metrics, write_config
from tests.oracles.command_line import trained as trained_by
from tests.oracles.launched import launch

LORA = {"passes": {"lora": {"rank": 4, "alpha": 8}}}
FULL = {"passes": {"lora": None, "full": {}}}
STEADY = {  # an epsilon of the size of gradients: else rounding errors become whole steps
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2, "eps": 1e-3},
    "loader": {"batch_size": 1, "mode": "padded"},
    "max_steps": 4,
    "validate_every": 2,
}


@pytest.fixture
def steady(config):
    """A config whose runs can be compared, and its run in one process with the global batch of
    two ranks."""
    del config["retention"]
    return changed(config, STEADY)


def assert_close(found, expected):
    """Losses and what was saved of two runs, to 1e-6."""
    ours, theirs = metrics(found), metrics(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "tokens", "lr", "heldout_loss"):
            assert line.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-6), (key, line)
    ours, theirs = trained_by(found), trained_by(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def run(tmp_path, name, path, *words, ranks=1):
    """Train into a folder of that name."""
    folder = tmp_path / name
    words = ["train", path, f"output_dir={folder}", *words]
    if ranks == 1:
        assert graphtune(*words) == 0
        return folder
    ended = launch(tmp_path, *words, ranks=ranks)
    assert [code for code, _ in ended] == [0] * ranks, ended
    return folder


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_two_ranks_are_one_process(steady, tmp_path, trains):
    path = write_config(
        tmp_path / "config.yaml", changed(steady, {"lora": LORA, "full": FULL}[trains])
    )
    alone = run(tmp_path, "alone", path, "gradient_accumulation_steps=2")
    sharded = run(tmp_path, "sharded", path, "passes.fsdp={}", ranks=2)
    assert_close(sharded, alone)
    replicated = run(tmp_path, "replicated", path, ranks=2)
    assert_close(replicated, alone)
    before, after = (lines(one / "metrics.jsonl")[-1] for one in (alone, sharded))
    assert before["padding"] == pytest.approx(after["padding"]), "tokens of all ranks"
