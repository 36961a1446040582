"""Data sets and layouts of batches, as a config names them."""

import json

import pytest
import torch
from torch._dynamo.utils import counters

from graphtune.recipes import sft
from tests.oracles.command_line import changed, graphtune, metrics, write_config


@pytest.fixture
def other(tmp_path):
    """A second data set, whose answers are their own."""
    path = tmp_path / "other.jsonl"
    rows = [{"prompt": f"Say {i}", "response": "Never at all."} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"_component_": "graphtune.data.instruct", "source": str(path)}


@pytest.fixture
def answers(quick, tmp_path, monkeypatch, tokenizer):
    """Run the recipe; how often each answer was trained on."""

    def run(*changes):
        found = []
        real = sft.take_step

        def step(training, group, run):
            for batch in group:
                for row in batch["labels"]:
                    found.append(tokenizer.decode(row[row >= 0]))
            return real(training, group, run)

        monkeypatch.setattr(sft, "take_step", step)
        path = write_config(tmp_path / "config.yaml", changed(quick, *changes))
        assert graphtune("train", path) == 0
        text = " ".join(found)
        return text.count("Both."), text.count("Never at all.")

    return run


def test_a_list_of_data_sets_is_mixed_by_weight_or_laid_end_to_end(answers, quick, other, tmp_path):
    parts = [quick["dataset"] | {"weight": 3}, other | {"weight": 1}]
    whole = {"max_steps": None, "loader": {"mode": "padded"}}
    assert answers(whole, {"dataset": parts}) == (24, 8)
    (tmp_path / "run").rename(tmp_path / "weighted")
    assert answers(whole, {"dataset": [quick["dataset"], other]}) == (24, 12)


def test_a_stream_among_them_makes_it_a_stream(answers, quick, other):
    parts = [quick["dataset"] | {"weight": 1, "streaming": True}, other | {"weight": 1}]
    both, never = answers({"dataset": parts, "max_steps": 6, "loader": {"mode": "padded"}})
    assert both + never == 12 and both > 2 and never > 2


def test_a_stream_that_ends_is_told(answers, quick, tmp_path, capsys):
    dataset = quick["dataset"] | {"streaming": True}
    assert answers({"dataset": dataset, "max_steps": 99, "loader": {"mode": "padded"}}) == (24, 0)
    assert "the data ended before step 99" in capsys.readouterr().out
    assert len(metrics(tmp_path / "run")) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "shapes"), [("padded", 1), ("packed", 1), ("bucketed", 3), ("padding_free", 3)]
)
def test_a_step_is_compiled_at_most_once_for_each_shape(quick, tmp_path, mode, shapes):
    """And once more before the first: for the check against eager, which has no dropout."""
    data = tmp_path / "uneven.jsonl"
    rows = [
        {"prompt": "What is it? " * (1 + i % 4), "response": "It. " * (i % 7)} for i in range(40)
    ]
    rows = [row for row in rows if row["response"]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = changed(
        quick,
        {"dataset": quick["dataset"] | {"source": str(data)}, "epochs": 2, "max_steps": None},
        {"loader": {"mode": mode, "shapes": 3, "batch_size": 2, "length": 128}},
        {"passes": {"lora": {"dropout": 0.1}}, "compile": True},
    )
    torch._dynamo.reset()
    counters.clear()
    assert graphtune("train", write_config(tmp_path / "config.yaml", config)) == 0
    assert len(metrics(tmp_path / "run")) > 8
    assert 1 <= counters["stats"]["unique_graphs"] <= shapes + 1
