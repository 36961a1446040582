"""Quantized bases: torchao's numbers, little memory, and what cannot be."""

import copy
from functools import partial

import pytest
import torch
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

import graphtune as gt
from graphtune.inspect import ledger
from graphtune.losses import cross_entropy, loss_sum
from graphtune.passes import DoRA, Full, LoRA, Merge, QLoRA, Quantize
from graphtune.rewrite import evaluate, tensor_bytes
from graphtune.sites import find_sites
from tests.oracles.by_hand import put_in
from tests.oracles.models import random_ids, tiny_gpt2, tiny_model
from tests.passes.test_composition import shake, tiny_llama

IDS = random_ids(2, 9)


class Torchao(torch.nn.Module):
    """A linear over an NF4Tensor, with LoRA beside it."""

    def __init__(self, linear, scaling, a, b):
        super().__init__()
        self.weight = to_nf4(linear.weight.detach(), 64, 256)
        self.scaling, self.a, self.b = scaling, a, b

    def forward(self, x):
        return linear_nf4(x, self.weight) + self.scaling * (x @ self.a.T @ self.b.T)


def test_qlora_is_torchaos():
    model = tiny_llama(False, False, layers=2)
    program = gt.capture(model).apply(QLoRA(rank=4, alpha=8))
    shake(program)
    reference = copy.deepcopy(model)
    factors = {}
    for name in program.ledger[-1].sites:
        a, b = (
            program.get_parameter(f"{name}.lora_{m}.default.weight").detach().requires_grad_()
            for m in "AB"
        )
        factors |= {f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b}
        put_in(reference, name, Torchao(reference.get_submodule(name), 2.0, a, b))
    loss = cross_entropy(program(IDS), IDS)
    expected = cross_entropy(reference(input_ids=IDS, use_cache=False).logits, IDS)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for name, factor in factors.items():
        found = program.get_parameter(name).grad
        assert (found - factor.grad).norm() <= 1e-6 * factor.grad.norm(), name


def kept_weights(program, loss_sum):
    """The loss, and how many tensors kept for its backward are as large as a quantized weight."""
    sizes = {128 * 128, 128 * 256}
    ids = random_ids(2, 11)
    found = []

    def pack(tensor):
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_sum({"input_ids": ids, "labels": ids})
    frozen = {p.data_ptr() for p in program.parameters()}
    large = [t for t in found if t.is_floating_point() and t.dim() == 2 and t.numel() in sizes]
    return loss, sum(t.data_ptr() not in frozen for t in large)


@pytest.mark.parametrize("kind", [LoRA, pytest.param(DoRA, marks=pytest.mark.slow)])
def test_no_dequantized_weight_is_kept_for_backward(kind):
    program = gt.capture(tiny_llama(False, False, layers=2)).apply(Quantize(), kind(rank=4))
    shake(program)
    step = gt.compile_step(program, torch.optim.SGD(program.trainable_parameters(), lr=0.1))
    loss, kept = kept_weights(program, step.loss_sum)
    assert kept == 0
    # Torch's own way keeps all but those of the first layer's q, k and v, whose input needs no
    # gradient: the test can fail.
    eager, kept = kept_weights(program, partial(loss_sum, program))
    assert kept == 11
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss, step.parameters)
    others = torch.autograd.grad(eager, step.parameters)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def _large_saved(loss):
    """Of the tensors that a graph of autograd holds, those as large as a quantized weight."""
    nodes, seen, found = [loss.grad_fn], set(), 0
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                data = getattr(node, name).data if hasattr(getattr(node, name), "data") else None
                found += isinstance(data, torch.Tensor) and data.numel() in (16384, 32768)
    return found


@pytest.mark.parametrize("format", ["nf4", "int8", "int4"])
def test_an_uncompiled_step_keeps_none_either(format):
    program = gt.capture(tiny_llama(False, False)).apply(Quantize(format=format), LoRA(rank=4))
    shake(program)
    step = gt.compile_step(
        program, torch.optim.SGD(program.trainable_parameters(), lr=0.1), compile=False
    )
    batch = {"input_ids": IDS, "labels": IDS}
    loss = step.loss_sum(batch)
    assert _large_saved(loss) == 1  # the output head's weight, which is a parameter
    assert _large_saved(partial(loss_sum, program)(batch)) == 5  # q, k, v, gate, up: no gradient in
    found = torch.autograd.grad(loss, step.parameters)
    expected = torch.autograd.grad(partial(loss_sum, program)(batch), step.parameters)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("format", "bits"), [("nf4", 4.2), ("int8", 8.3), ("int4", 5.1)])
def test_weights_are_stored_in_few_bits(format, bits):
    base = gt.capture(tiny_llama(False, False))
    stored = base.apply(Quantize(format=format))
    weights = sum(base.get_parameter(f"{name}.weight").numel() for name in stored.ledger[-1].sites)
    kept = tensor_bytes(stored) - tensor_bytes(base) + 4 * weights
    assert kept * 8 <= weights * bits
    assert stored.ledger[-1].bytes == tensor_bytes(stored) - tensor_bytes(base)
    assert stored.state_dict().keys() > {f"model.layers.0.self_attn.q_proj.weight_{format}"}


def test_base_weights_do_not_change_and_tied_ones_part():
    model = tiny_model("llama")
    base = gt.capture(model)
    stored = base.apply(Quantize(format="int8", targets=["lm_head"]))
    assert torch.equal(base(IDS), model(input_ids=IDS, use_cache=False).logits)
    assert torch.equal(
        stored.get_parameter("model.embed_tokens.weight"), model.model.embed_tokens.weight
    )
    assert "lm_head.weight" not in dict(stored.named_parameters())


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_conv1d_is_quantized_and_adapted(kind):
    base = gt.capture(tiny_gpt2())
    stored = base.apply(Quantize())
    tuned = stored.apply(kind(rank=4))
    assert torch.equal(tuned(IDS), stored(IDS))
    shake(tuned)
    merged = tuned.apply(Merge(dequantize=True))
    torch.testing.assert_close(merged(IDS), tuned(IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_merging_into_a_quantized_base_tells_what_is_lost(format):
    program = gt.capture(tiny_llama(False, False)).apply(Quantize(format=format), LoRA(rank=4))
    shake(program)
    merged = program.apply(Merge())
    assert not any("lora" in name for name in merged.state_dict())
    name = "model.layers.0.self_attn.q_proj"
    assert f"{name}.weight_{format}" in merged.state_dict()
    lost = update = 0.0
    exact = program.apply(Merge(dequantize=True)).all_parameters()
    before = gt.capture(tiny_llama(False, False)).apply(Quantize(format=format))
    for site in program.ledger[-1].sites:
        wanted = exact[f"{site}.weight"]
        lost += (_weight(merged, site) - wanted).square().sum()
        update += (wanted - _weight(before, site)).square().sum()
    figures = merged.ledger[-1].figures
    assert figures["lost_of_update"] == pytest.approx(float((lost / update).sqrt()), rel=1e-4)
    assert 0 < figures["lost_of_weights"] < (0.15 if format == "nf4" else 0.02)
    assert "lost_of_update" in ledger(merged)


def _weight(program, name):
    """A quantized weight as the graph computes it."""
    site = next(s for s in find_sites(program.graph) if s.name == name)
    tensors = {n: b for n, (b, _) in program.all_buffers().items()}
    return evaluate(site.weight, tensors)


def test_qlora_is_quantize_and_lora():
    base = gt.capture(tiny_llama(True, False))
    torch.manual_seed(0)
    one = base.apply(QLoRA(rank=4, quantize="int8"))
    torch.manual_seed(0)
    other = base.apply(LoRA(rank=4), Quantize(format="int8"))
    assert [row.name for row in one.ledger] == ["quantize", "lora"]
    assert [row.options for row in one.ledger] == [row.options for row in other.ledger]
    assert torch.equal(one(IDS), other(IDS))
    direct = QLoRA(rank=4, quantize="int8")(base)
    assert [row.name for row in direct.ledger] == ["quantize", "lora"]


def test_norms_train_in_full_over_a_quantized_base():
    program = gt.capture(tiny_llama(True, False)).apply(Quantize(), Full(targets=["*norm*"]))
    assert all("norm" in n for n, p in program.named_parameters() if p.requires_grad)
    assert any(p.requires_grad for p in program.parameters())


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Quantize(targets=["q_porj"])], r"passes.quantize.targets.*q_porj.*nearest: q_proj"),
        ([Quantize(format="int4", targets=["down_proj"])], "int4.*down_proj.*group size, 32"),
        (
            [Quantize(format="int8", targets=["embed_tokens"]), LoRA(targets=["embed_tokens"])],
            "embed_tokens is a quantized embedding",
        ),
        ([Quantize(), LoRA(init="pissa")], "init=pissa.*quantized"),
        ([Quantize(targets=[{"sites": "q_proj", "format": "int3"}])], "format=int3"),
    ],
)
def test_what_cannot_be_is_refused(passes, message):
    with pytest.raises(gt.UserError, match=message):
        gt.capture(tiny_model("llama")).apply(*passes)


def test_quantizing_twice_or_under_an_adapter_is_refused():
    base = gt.capture(tiny_llama(True, False))
    with pytest.raises(gt.UserError, match="quantized already"):
        base.apply(Quantize()).apply(Quantize())
    with pytest.raises(gt.UserError, match="carries the adapter 'default'.*one `apply`"):
        base.apply(LoRA(rank=2)).apply(Quantize())


def test_a_quantized_embedding_works():
    model = tiny_model("llama")
    program = gt.capture(model).apply(Quantize(format="int8", targets=["embed_tokens"]))
    scale = model(input_ids=IDS, use_cache=False).logits.abs().max()
    found, expected = program(IDS), model(input_ids=IDS, use_cache=False).logits
    assert (found - expected).abs().max() < 0.05 * scale
