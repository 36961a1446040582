"""A whole run through the command line: train, generate, inspect, export; and bad input."""

import copy
import json
import re

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import graphtune as gt
from graphtune.cli import main
from graphtune.data import collation
from graphtune.recipes import load_run
from tests.oracles.models import random_ids


def graphtune(*argv):
    """Run the command line; its exit code."""
    try:
        main([str(word) for word in argv])
    except SystemExit as end:
        return end.code or 0
    return 0


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_generate_and_export(config, write, tmp_path, model_folder, capsys):
    assert graphtune("train", write(config)) == 0
    run = tmp_path / "run"
    output = capsys.readouterr().out
    assert "held-out loss" in output and "unrelated text, perplexity" in output

    metrics = lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert metrics[0]["lr"] == pytest.approx(5e-3)
    assert metrics[1]["lr"] == pytest.approx(1e-2)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["heldout_loss"] < summary["before"]["heldout_loss"] - 0.1

    # The figures are those of transformers and PEFT on the same rows.
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(base), run / "adapter")
    program, _ = load_run(run)
    ids = random_ids(2, 9)
    assert torch.equal(program.eval()(ids), tuned.eval()(ids).logits)
    assert torch.equal(load_run(run, tuned=False)[0].eval()(ids), base.eval()(ids).logits)

    assert graphtune("generate", run, "What is 1 and 2?", "--max-new-tokens", 6) == 0
    answer = capsys.readouterr().out
    assert graphtune("generate", run, "What is 1 and 2?", "--max-new-tokens", 6, "--base") == 0
    assert capsys.readouterr().out != answer

    assert graphtune("export", run, "--to", "peft") == 0
    assert graphtune("export", run, "--to", "hf") == 0
    merged = AutoModelForCausalLM.from_pretrained(run / "hf").eval()
    torch.testing.assert_close(merged(ids).logits, tuned(ids).logits, atol=1e-5, rtol=1e-5)
    exported = peft.PeftModel.from_pretrained(copy.deepcopy(base), run / "peft").eval()
    assert torch.equal(exported(ids).logits, tuned(ids).logits)
    assert graphtune("export", run, "--to", "hf") == 2, "would overwrite"


def test_compiled_run_has_the_losses_of_an_uncompiled_one(config, write, tmp_path, monkeypatch):
    """One has masks of its packed rows, the other is told where documents lie."""
    torch._dynamo.reset()
    path = write(config)
    masks = []
    make = collation.attention_mask
    monkeypatch.setattr(collation, "attention_mask", lambda x: masks.append(x) or make(x))
    for name, compiled in (("eager", False), ("compiled", True)):
        run = tmp_path / name
        masks.clear()
        assert graphtune("train", path, f"output_dir={run}", f"compile={compiled}") == 0
        assert bool(masks) != compiled
    eager, compiled = (lines(tmp_path / name / "metrics.jsonl") for name in ("eager", "compiled"))
    assert len(eager) == len(compiled) == 8
    for a, b in zip(eager, compiled, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)


def test_full_fine_tuning_saves_the_model(config, write, tmp_path, model_folder):
    config["passes"] = {}
    config["optimizer"]["lr"] = 1e-3
    assert graphtune("train", write(config)) == 0
    ids = random_ids(2, 9)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    program, _ = load_run(tmp_path / "run")
    assert torch.equal(program.eval()(ids), model(ids).logits)
    assert not torch.equal(
        model(ids).logits, AutoModelForCausalLM.from_pretrained(model_folder).eval()(ids).logits
    )


def test_accumulation_and_unpacked_rows(config, write, tmp_path):
    config |= {"gradient_accumulation_steps": 2, "max_steps": None, "epochs": 2}
    config["loader"] = {"batch_size": 3, "length": 64, "mode": "padded"}
    assert graphtune("train", write(config)) == 0
    steps = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(steps) == 2 * (24 // 3 // 2)


def test_same_seed_same_run(config, write, tmp_path):
    path = write(config)
    for name in ("one", "two"):
        assert graphtune("train", path, f"output_dir={tmp_path / name}") == 0
    one, two = (lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["loss"] for line in one] == [line["loss"] for line in two]


def test_inspect_shows_tree_and_ledger(config, write, capsys):
    assert graphtune("inspect", write(config)) == 0
    output = capsys.readouterr().out
    assert "0-1 x2 LlamaDecoderLayer" in output
    assert "q_proj Linear 32→32 [lora r4 α8]" in output
    assert "identity_at_init" in output
    assert graphtune("inspect", write(config), "--json", "passes.lora.rank=2") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["options"]["rank"] == 2
    assert len(row["sites"]) == 14


def test_inspect_shows_what_a_rank_of_a_mesh_holds_and_exchanges(config, write, capsys):
    words = ("inspect", write(config), "--mesh", "dp=4", "--json", "passes.fsdp={}")
    assert graphtune(*words) == 0
    told = json.loads(capsys.readouterr().out)["mesh"]
    assert told["ranks"] == 4 and told["mesh"]["dp_shard"] == 4
    kinds = {(row["phase"], row["kind"]) for row in told["exchanges"]}
    assert ("backward", "reduce-scatter") in kinds
    assert all(row["bytes"] == row["theory_bytes"] > 0 for row in told["exchanges"])
    for mesh, said in (
        ("ep=2", "no axis 'ep'"),
        ("tp=3", "tp=3 does not divide the model's num_"),
        ("dp=0", "a number of ranks"),
        ("dp=1", "is one process"),
    ):
        assert graphtune("inspect", write(config), "--mesh", mesh) == 2
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", r"optimiser.*did you mean `optimizer`"),
        ("loader.lenght=64", r"loader.lenght.*did you mean"),
        ("model.id=missing/model/folder", r"model.id.*missing/model/folder.*does not exist"),
        ("passes.lora.targets=[q_prj]", r"passes.lora.targets.*q_prj.*nearest: q_proj"),
        ("passes.lora.rnk=4", r"passes.lora.rnk.*rank"),
        ("passes.lroa.rank=4", r"passes.lroa.*lora"),
        ("passes.lora.rank=17", r"passes.lora.rank=17.*at most 16"),
        ("dataset.source={empty}", r"dataset.*no (examples|rows)|dataset.*empty"),
        ("dataset.source=nowhere.jsonl", r"dataset.*nowhere.jsonl"),
        ("loader.length=4096", r"loader.length=4096.*128 positions"),
        ("output_dir={used}", r"output_dir=.*another run"),
        ("device=cuda:99", r"device=cuda:99"),
        ("recipe=stf", r"recipe.*sft"),
        ("optimizer._component_=torch.optim.AdamX", r"optimizer.*AdamX.*did you mean `Adam"),
    ],
)
def test_bad_input_is_one_line_before_capture(
    config, write, tmp_path, capsys, monkeypatch, override, message
):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.yaml").write_text("")
    override = override.format(empty=tmp_path / "empty.jsonl", used=tmp_path / "used")

    def too_late(model):
        raise AssertionError("capture started")

    monkeypatch.setattr("graphtune.recipes.sft.capture", too_late)
    assert graphtune("train", write(config), override) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("graphtune: error: ")
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(config, write, capsys):
    assert graphtune("train", write(config), "loader.lenght=1", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert graphtune("generate", tmp_path, "hello") == 2
    assert "holds no config.json" in capsys.readouterr().err  # nor a model


def test_the_readmes_ten_lines(model_folder):
    from graphtune.passes import LoRA

    model = gt.load_model(model_folder)
    program = gt.capture(model).apply(LoRA(rank=8, alpha=16, targets=["all-linear"]))
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=1e-2)
    step = gt.compile_step(program, optimizer, compile=False)
    ids = random_ids(2, 9)
    losses = [step({"input_ids": ids, "labels": ids})["loss"] for _ in range(5)]
    assert losses[-1] < losses[0]
