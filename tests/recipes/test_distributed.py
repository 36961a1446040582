"""Runs on two ranks are, up to rounding, the run in one process with the same global batch."""

import os
import signal
import time

import pytest
import torch

from tests.oracles.command_line import changed, graphtune, lines, metrics, start, write_config
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


@pytest.mark.parametrize("trains", ["lora", pytest.param("full", marks=pytest.mark.slow)])
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
    ranks = after["ranks"]
    assert all(len(ranks[name]) == 2 for name in ("step_s", "tokens", "peak_memory_bytes"))
    slots = [
        real / (1 - part) for real, part in zip(ranks["tokens"], ranks["padding"], strict=True)
    ]
    assert 1 - sum(ranks["tokens"]) / sum(slots) == pytest.approx(before["padding"])
    assert ranks["step_s"][ranks["slowest"]] == max(ranks["step_s"]) > 0
    assert min(ranks["peak_memory_bytes"]) > 2**20 and "ranks" not in before


@pytest.mark.slow
@pytest.mark.parametrize(
    "passes",
    [
        {"tensor_parallel": {}},
        {"context_parallel": {}},
    ],
)
def test_ranks_that_share_a_batch_are_one_process(steady, tmp_path, passes):
    path = write_config(tmp_path / "config.yaml", changed(steady, FULL))
    alone = run(tmp_path, "alone", path)
    (name,) = passes
    axis = "tp" if name == "tensor_parallel" else "cp"
    config = changed(steady, FULL, {"passes": passes, "mesh": {axis: 2}})
    path = write_config(tmp_path / "config.yaml", config)
    assert_close(run(tmp_path, "divided", path, ranks=2), alone)


STAGES = {"lr_scheduler": {"name": "constant", "warmup_steps": 0}, "validate_every": None}


@pytest.mark.filterwarnings("ignore:.*on other ranks")
def test_a_run_goes_on_with_fewer_or_more_ranks(steady, tmp_path):
    config = changed(
        steady, FULL, STAGES, {"passes": {"fsdp": {}}, "checkpoint": {"every_steps": 2}}
    )
    del config["dataset_val"]
    path = write_config(tmp_path / "config.yaml", config)
    alone = run(tmp_path, "alone", path, "gradient_accumulation_steps=2")
    for name, ranks in (("fewer", (2, 1)), ("more", (1, 2))):
        for steps, many in zip((2, 4), ranks, strict=True):
            words = (
                "resume=auto",
                f"max_steps={steps}",
                f"gradient_accumulation_steps={2 // many}",
            )
            folder = run(tmp_path, name, path, *words, ranks=many)
        assert_close(folder, alone)


@pytest.mark.parametrize(
    ("words", "of_rank", "said"),
    [
        (("mesh.tp=3",), {}, "tp=3 must be the number of processes, 2"),
        (
            ("passes.tensor_parallel={}", "mesh.tp=2"),
            {},
            "tp=2 does not divide the 331 tokens",
        ),
        ((), {1: ["optimizer.lr=1"]}, "`optimizer.lr` is 0.01 on rank 0, 1 on rank 1"),
        (("mesh.timeout_s=3",), {1: None}, "no sign of rank 1 of 2 in `mesh.timeout_s=3`"),
        (("mesh.timeout_s=3",), {0: None}, "rank 0 cannot be met at 127.0.0.1"),
        (("model.id=/nowhere",), {}, "/nowhere"),
        (("passes.fsdp={}", "samples={prompts: [Hello]}"), {}, "`samples` need the whole model"),
        (
            ("passes.lora.rank=2", "max_steps=2", "resume=auto"),
            {},
            "`passes.lora.rank` was 4, is 2",
        ),
    ],
)
def test_what_cannot_work_is_told_on_every_rank(config, tmp_path, words, of_rank, said):
    path = write_config(tmp_path / "config.yaml", changed(config, {"max_steps": 1}))
    if "resume=auto" in words:
        assert graphtune("train", path, "max_steps=1", "checkpoint.every_steps=1") == 0
    for code, output in launch(tmp_path, "train", path, *words, of_rank=of_rank):
        assert code == 2, output
        assert said in " ".join(output.split()), output


@pytest.mark.slow
def test_a_rank_is_killed_and_torchrun_starts_the_run_again(steady, tmp_path):
    config = changed(steady, LORA, {"passes": {"fsdp": {}}, "max_steps": 40, "epochs": 10})
    config = changed(config, {"checkpoint": {"every_steps": 1}, "resume": "auto"})
    del config["dataset_val"]
    config["validate_every"] = None
    path = write_config(tmp_path / "config.yaml", config)
    whole = run(tmp_path, "whole", path, ranks=2)
    log, folder = tmp_path / "log", tmp_path / "run"
    words = ("train", "--nproc-per-node", "2", "--max-restarts", "2", path)
    torchrun = start(*words, log=log)
    seen = folder / "metrics.jsonl"
    while torchrun.poll() is None and not (seen.exists() and len(lines(seen)) > 3):
        time.sleep(0.02)
    assert torchrun.poll() is None, log.read_text()
    os.kill(rank_of(torchrun.pid, 1), signal.SIGKILL)
    assert torchrun.wait(300) == 0, log.read_text()
    assert "going on from" in log.read_text()
    assert metrics(folder) == metrics(whole)
    for name, tensor in trained_by(whole).items():
        assert torch.equal(trained_by(folder)[name], tensor), name


def rank_of(parent, rank):
    """Process id of a rank that a launcher has started."""
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        for child in map(int, file.read().split()):
            with open(f"/proc/{child}/environ", "rb") as environment:
                if f"\0RANK={rank}\0".encode() in b"\0" + environment.read():
                    return child
    raise AssertionError(f"no rank {rank} under {parent}")
