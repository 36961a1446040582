"""Weights that are streamed into an empty program end up where loaded ones would."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

import graphtune as gt
from graphtune.passes import DoRA, Full, LoRA, Merge, Pass, QLoRA, Quantize, Stage
from graphtune.verify import VerificationError
from graphtune.weights import fill, fingerprint
from tests.oracles.models import FAMILIES, random_ids, tiny_gpt2, tiny_model

IDS = random_ids(2, 9)
PLANS = {
    "none": [],
    "lora": [LoRA(rank=2, modules_to_save=["model.norm"])],
    "dora": [DoRA(rank=2, targets=["all-linear", "embed_tokens"])],
    "pissa": [LoRA(rank=2, init="pissa")],
    "nf4": [Quantize(), DoRA(rank=2)],
    "int8": [QLoRA(rank=2, quantize="int8")],
    "mixed": [
        Quantize(targets=[{"sites": "up_proj", "format": "int4"}, "all-linear"]),
        Full(["*norm*"]),
    ],
    "merged": [Quantize(), LoRA(rank=2), Merge()],
}


def save(model, folder):
    model.config.use_cache = True
    model.save_pretrained(folder, max_shard_size="20KB")
    return str(folder)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("plan", PLANS)
def test_streamed_through_passes_is_loaded_and_rewritten(plan, tmp_path):
    folder = save(tiny_model("llama"), tmp_path)
    torch.manual_seed(1)
    expected = gt.capture(gt.load_model(folder)).apply(*PLANS[plan])
    torch.manual_seed(1)
    empty = gt.capture(gt.load_model(folder, device="meta", dtype="float32")).apply(*PLANS[plan])
    assert all(parameter.is_meta for parameter in empty.parameters())
    found = gt.load_weights(empty, device="cpu")
    same(found.state_dict(), expected.state_dict())
    assert torch.equal(found(IDS), expected(IDS))
    trains = {n for n, p in found.named_parameters() if p.requires_grad}
    assert trains == {n for n, p in expected.named_parameters() if p.requires_grad}
    if plan != "merged":
        assert found.info.fingerprint == expected.info.fingerprint


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_streams(family, tmp_path):
    folder = save(tiny_model(family), tmp_path)
    expected = gt.capture(gt.load_model(folder))
    found = gt.load_weights(gt.capture(gt.load_model(folder, device="meta", dtype="float32")))
    assert torch.equal(found(IDS), expected(IDS))
    ties = {id(p) for p in expected.all_parameters().values()}
    assert len({id(p) for p in found.all_parameters().values()}) == len(ties)
    assert found.info.fingerprint == expected.info.fingerprint


def test_weights_may_come_in_any_order(tmp_path):
    model = tiny_gpt2()
    folder = save(model, tmp_path)
    empty = gt.capture(gt.load_model(folder, device="meta")).apply(Quantize(), LoRA(rank=2))
    stream = list(model.state_dict().items())
    results = []
    for order in (stream, stream[::-1]):
        torch.manual_seed(0)
        results.append(fill(empty, order, torch.device("cpu")))
    same(results[0].state_dict(), results[1].state_dict())


def test_quantized_weights_are_let_go_at_once(tmp_path):
    """Of a model whose linears are quantized, no two full weights are there at a time."""
    model = tiny_model("llama")
    folder = save(model, tmp_path)
    empty = gt.capture(gt.load_model(folder, device="meta", dtype="float32")).apply(Quantize())
    alive: list = []
    most = 0

    def stream():
        nonlocal most
        import weakref

        for name, tensor in model.state_dict().items():
            copy = tensor.clone()
            if "proj" in name:
                alive.append(weakref.ref(copy))
            yield name, copy
            del copy
            most = max(most, sum(one() is not None for one in alive))

    fill(empty, stream(), torch.device("cpu"))
    assert len(alive) == 14
    assert most == 0


def test_a_program_without_weights_says_so(tmp_path):
    folder = save(tiny_model("llama"), tmp_path)
    empty = gt.capture(gt.load_model(folder, device="meta"))
    with pytest.raises(gt.UserError, match="load_weights"):
        empty(IDS)
    with pytest.raises(gt.UserError, match="has its weights already"):
        gt.load_weights(gt.load_weights(empty))


def test_wrong_checkpoints_are_refused(tmp_path):
    folder = save(tiny_model("llama"), tmp_path)
    empty = gt.capture(gt.load_model(folder, device="meta", dtype="float32"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = "model.layers.1.self_attn.q_proj.weight"
    file = tmp_path / index["weight_map"][name]
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][:8].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(gt.UserError, match=rf"{name}.*\(8, 32\).*\(32, 32\)"):
        gt.load_weights(empty)
    del tensors[name]
    save_file({**tensors, "odd": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.warns(match="odd"), pytest.raises(gt.UserError, match=f"lacks '{name}'"):
        gt.load_weights(empty)


@dataclass(frozen=True)
class _Lies(Pass):
    name = "lies"
    stage = Stage.ADAPT
    numerics = "exact"

    def rewrite(self, edit):
        site = edit.sites("linear")[0]
        with edit.after(site.node):
            edit.replace_uses(site.node, edit.call(torch.ops.aten.mul.Tensor, site.node, 1.01))
        return [site]


def test_claims_are_checked_when_the_weights_are_there(tmp_path):
    folder = save(tiny_model("llama"), tmp_path)
    empty = gt.capture(gt.load_model(folder, device="meta")).apply(LoRA(rank=2), _Lies())
    with pytest.raises(VerificationError, match="lies: claims the same output"):
        gt.load_weights(empty)


def test_fingerprint_tells_weights_apart_but_not_dtypes():
    parameters = dict(tiny_model("llama").bfloat16().named_parameters())
    whole = fingerprint(parameters)
    assert fingerprint({n: p.float() for n, p in parameters.items()}) == whole
    assert fingerprint(dict(reversed(parameters.items()))) == whole
    changed = {n: p.detach().clone() for n, p in parameters.items()}
    changed["model.norm.weight"][3] += 1
    assert fingerprint(changed) != whole
