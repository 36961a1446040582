"""Experts of mixture models: adapters without making the update of the weights, PEFT's layout."""

import copy

import peft
import pytest
import torch

import graphtune as gt
from graphtune.export.peft import from_peft, to_peft
from graphtune.passes import DoRA, LoRA, Merge, Quantize
from tests.oracles.models import MIXTURES, gradients, random_ids, tiny_model
from tests.oracles.peft import logits

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = random_ids(3, 12)


def tuned_program(family, targets):
    model = tiny_model(family)
    program = gt.capture(model).apply(LoRA(rank=4, alpha=8, targets=targets))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, program


@pytest.mark.parametrize("targets", [["q_proj", *EXPERTS], EXPERTS[:1], EXPERTS[1:]])
@pytest.mark.parametrize("family", MIXTURES)
def test_adapter_is_pefts(family, targets, tmp_path):
    model, program = tuned_program(family, targets)
    to_peft(program, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(
        copy.deepcopy(model), tmp_path / "ours", is_trainable=True
    )
    found, expected = program(IDS), logits(theirs, IDS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ours = list(gradients(found, program).values())
    for one, other in zip(ours, _in_our_order(program, theirs, expected), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = from_peft(gt.capture(model), tmp_path / "theirs")
    assert torch.equal(again(IDS), found)
    merged = program.apply(Merge())
    torch.testing.assert_close(merged(IDS), found, atol=1e-5, rtol=1e-5)


def _in_our_order(program, theirs, expected):
    """PEFT's gradients, found by the values of their parameters."""
    parameters = dict(theirs.named_parameters())
    found = gradients(expected, theirs)
    for parameter in program.trainable_parameters():
        name = next(n for n in found if torch.equal(parameters[n], parameter))
        yield found[name]


def test_all_linear_is_attention_and_experts_but_not_routers():
    row = gt.capture(tiny_model("mixtral")).apply(LoRA(rank=2)).ledger[-1]
    names = {name.split(".", 3)[-1] for name in row.sites}
    assert names == {f"self_attn.{one}_proj" for one in "qkvo"} | set(EXPERTS)


def test_the_update_of_the_weights_is_never_made():
    program = gt.capture(tiny_model("mixtral")).apply(LoRA(rank=2, targets=EXPERTS))
    sizes = [4 * 96 * 32, 4 * 32 * 48]
    made = [
        node
        for node in program.graph.nodes
        if node.op == "call_function"
        and "adapter" in node.meta.get("custom", {})
        and node.meta["val"].numel() in sizes
    ]
    assert made == []


def test_what_peft_has_not_is_refused():
    base = gt.capture(tiny_model("mixtral"))
    with pytest.raises(gt.UserError, match="experts, which DoRA cannot adapt"):
        base.apply(DoRA())
    with pytest.raises(gt.UserError, match="experts site"):
        base.apply(LoRA(init="pissa"))


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantized_experts(storage):
    base = gt.capture(tiny_model("mixtral"))
    stored = base.apply(Quantize(format=storage, targets=EXPERTS))
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in stored.state_dict())
    program = stored.apply(LoRA(rank=4, targets=EXPERTS))
    assert torch.equal(program(IDS), stored(IDS))
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    merged = program.apply(Merge(dequantize=True))
    torch.testing.assert_close(merged(IDS), program(IDS), atol=1e-4, rtol=1e-4)
