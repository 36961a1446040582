"""A graph that was captured once is read from disk, and only while nothing it depends on moves."""

import importlib
import shutil

import pytest
import torch

import graphtune as gt
from graphtune.capture_cache import cache_file
from graphtune.passes import LoRA, Quantize
from tests.oracles.models import random_ids, tiny_model

IDS = random_ids(2, 9)
module = importlib.import_module("graphtune.capture")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHTUNE_CACHE", str(tmp_path / "cache"))
    model = tiny_model("gemma3")
    model.config.use_cache = True
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def exports(monkeypatch):
    """How often a model was traced."""
    count = []
    real = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: count.append(1) or real(*a, **k))
    return count


def empty(folder, **options):
    return gt.load_model(folder, device="meta", **{"dtype": "float32"} | options)


def test_second_capture_is_read_and_is_the_same(folder, exports):
    first = gt.capture(empty(folder))
    second = gt.capture(empty(folder))
    assert len(exports) == 1
    assert [str(n.format_node()) for n in second.graph.nodes] == [
        str(n.format_node()) for n in first.graph.nodes
    ]
    results = []
    for program in (first, second):
        torch.manual_seed(0)
        results.append(gt.load_weights(program.apply(Quantize("int8"), LoRA(rank=2))))
    assert torch.equal(results[0](IDS), results[1](IDS))
    assert results[0].info.fingerprint == results[1].info.fingerprint


def test_what_it_depends_on_is_in_its_name(folder, tmp_path, exports):
    gt.capture(empty(folder))
    gt.capture(empty(folder, dtype="bfloat16"))
    other = empty(folder)
    other.config.sliding_window = 7
    gt.capture(other)
    gt.capture(empty(folder).eval())
    assert len(exports) == 4
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    program = gt.capture(empty(moved))
    assert len(exports) == 4, "the place of the weights is not part of the graph"
    assert program.source == str(moved)


def test_models_with_weights_or_of_unknown_code_are_captured_each_time(folder, exports):
    model = gt.load_model(folder)
    assert cache_file(model) is None
    mine = empty(folder)
    mine.__class__ = type("Mine", (type(mine),), {"__module__": "elsewhere"})
    assert cache_file(mine) is None


def test_a_damaged_file_is_captured_again(folder, exports):
    model = empty(folder)
    expected = gt.load_weights(gt.capture(model))(IDS)
    cache_file(model).write_bytes(b"damaged")
    with pytest.warns(match="capturing again"):
        again = gt.capture(empty(folder))
    assert len(exports) == 2
    assert torch.equal(gt.load_weights(again)(IDS), expected)
