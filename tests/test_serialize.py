"""A program that is saved and loaded is the same program, and can be worked on."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import graphtune as gt
from graphtune.passes import DoRA, LoRA, Merge, Quantize, SetAdapter
from graphtune.verify import verify
from tests.oracles.models import FAMILIES, gradients, random_ids, tiny_gpt2, tiny_model

IDS = random_ids(2, 9)


def same_graph(found, expected):
    def described(program):
        return [
            (n.op, n.name, str(n.target), str(n.args), str(n.kwargs), n.meta.get("custom") or {})
            for n in program.graph.nodes
        ]

    assert described(found) == described(expected)


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "gpt2"])
def test_saved_is_loaded(family, tmp_path):
    model = tiny_gpt2(dropout=0.2) if family == "gpt2" else tiny_model(family)
    program = gt.capture(model)
    program.save(tmp_path / "model.gt")
    loaded = gt.Program.load(tmp_path / "model.gt")
    same_graph(loaded, program)
    assert loaded.tree() == program.tree()
    assert type(loaded.config) is type(program.config)
    assert loaded.config.to_dict() == program.config.to_dict()
    torch.manual_seed(0)
    expected = program(IDS)
    torch.manual_seed(0)
    assert torch.equal(loaded(IDS), expected)
    ties = {id(p) for p in program.all_parameters().values()}
    assert len({id(p) for p in loaded.all_parameters().values()}) == len(ties)
    assert loaded.info.fingerprint == program.info.fingerprint


def test_passes_work_on_a_loaded_program(tmp_path):
    base = gt.capture(tiny_model("qwen2"))
    torch.manual_seed(0)
    expected = base.apply(Quantize(), DoRA(rank=2))
    torch.manual_seed(0)
    base.save(tmp_path / "base.gt")
    tuned = gt.Program.load(tmp_path / "base.gt").apply(Quantize(), DoRA(rank=2))
    same_graph(tuned, expected)
    tuned.save(tmp_path / "tuned.gt")
    again = gt.Program.load(tmp_path / "tuned.gt")
    same_graph(again, expected)
    assert [row.name for row in again.ledger] == ["quantize", "dora"]
    assert torch.equal(again(IDS), expected(IDS))
    for one, other in zip(
        gradients(again(IDS), again).items(),
        gradients(expected(IDS), expected).items(),
        strict=True,
    ):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    merged = again.apply(Merge(dequantize=True))
    assert torch.equal(merged(IDS), expected.apply(Merge(dequantize=True))(IDS))


def test_adapters_switch_after_loading(tmp_path):
    both = gt.capture(tiny_model("llama")).apply(LoRA(adapter="a")).apply(LoRA(adapter="b"))
    with torch.no_grad():
        for parameter in both.trainable_parameters():
            parameter.add_(0.1)
    both.save(tmp_path / "both.gt")
    loaded = gt.Program.load(tmp_path / "both.gt")
    for names in (["a"], ["b"], ["b", "a"]):
        expected, found = (one.apply(SetAdapter(names)) for one in (both, loaded))
        assert torch.equal(found(IDS), expected(IDS))


def test_shapes_are_free(tmp_path):
    program = gt.capture(tiny_model("llama"))
    program.save(tmp_path / "model.gt")
    loaded = gt.Program.load(tmp_path / "model.gt")
    logits = loaded.graph.output_node().args[0].meta["val"]
    assert all(isinstance(size, torch.SymInt) for size in logits.shape[:2])
    verify(program, loaded.apply(LoRA(rank=2)))
    step = gt.compile_step(
        loaded.apply(LoRA(rank=2)), torch.optim.SGD(program.parameters(), lr=0.1), compile=False
    )
    for shape in ((2, 5), (3, 17)):
        ids = random_ids(*shape)
        assert step({"input_ids": ids, "labels": ids})["tokens"] == shape[0] * (shape[1] - 1)


def test_a_program_without_weights_is_saved_as_one(tmp_path):
    model = tiny_model("llama")
    model.config.use_cache = True
    model.save_pretrained(tmp_path / "model")
    empty = gt.capture(gt.load_model(tmp_path / "model", device="meta", dtype="float32"))
    empty.save(tmp_path / "empty.gt")
    loaded = gt.Program.load(tmp_path / "empty.gt")
    filled = gt.load_weights(loaded.apply(LoRA(rank=2)))
    assert torch.equal(filled(IDS), gt.capture(model)(IDS))
    with pytest.raises(gt.UserError, match="load_weights"):
        empty.apply(LoRA()).save(tmp_path / "no.gt")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(gt.UserError, match="does not exist"):
        gt.Program.load(tmp_path / "none.gt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(gt.UserError, match="is no program"):
        gt.Program.load(tmp_path / "other.safetensors")
    save_file(
        load_file(tmp_path / "other.safetensors"),
        tmp_path / "new.gt",
        metadata={"graphtune": json.dumps({"version": 99})},
    )
    with pytest.raises(gt.UserError, match="another version"):
        gt.Program.load(tmp_path / "new.gt")
