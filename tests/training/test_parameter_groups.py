"""LoRA+ is PEFT's, and groups hold as they say."""

import copy

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

import graphtune as gt
from graphtune.losses import cross_entropy
from graphtune.passes import LoRA
from graphtune.training.parameter_groups import ParameterGroup, parameter_groups
from tests.oracles.models import assert_same_tensors, random_ids, tiny_model
from tests.oracles.peft import logits, peft_model, same_start, trainable

LORA_PLUS = ParameterGroup(("*.lora_B.*",), lr_ratio=16)


def test_lora_plus_takes_pefts_steps():
    model = tiny_model("qwen2")
    program = gt.capture(model).apply(LoRA(rank=4, alpha=8))
    reference = peft_model(model)
    same_start(reference, program)
    groups = parameter_groups(program.named_parameters(), [LORA_PLUS], lr=1e-3)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0)
    theirs = create_loraplus_optimizer(
        reference, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, weight_decay=0
    )
    for seed in range(3):
        ids = random_ids(2, 9, seed)
        for one, output in ((optimizer, program(ids)), (theirs, logits(reference, ids))):
            cross_entropy(output, ids).backward()
            one.step()
            one.zero_grad()
    ours = {name: p for name, p in program.named_parameters() if p.requires_grad}
    assert_same_tensors(ours, trainable(reference))


def test_first_group_decides_and_the_rest_comes_last():
    model = copy.deepcopy(tiny_model("qwen2"))
    norm = ParameterGroup(("*norm*",), weight_decay=0.0)
    rest = ParameterGroup(("*layers.0*",), lr_ratio=0.5)
    groups = parameter_groups(model.named_parameters(), [norm, rest], lr=0.1)
    assert [sorted(set(group) - {"params"}) for group in groups] == [
        ["lr", "weight_decay"],
        ["lr"],
        [],
    ]
    assert groups[1]["lr"] == pytest.approx(0.05)
    assert all(parameter.dim() == 1 for _, parameter in groups[0]["params"])
    counts = [len(group["params"]) for group in groups]
    assert sum(counts) == len(list(model.parameters()))


def test_a_group_of_nothing_is_refused():
    program = gt.capture(tiny_model("llama")).apply(LoRA(rank=2))
    frozen = ParameterGroup(("*.norm.*",), lr_ratio=2)
    with pytest.raises(gt.UserError, match=r"parameter_groups\[0\].parameters"):
        parameter_groups(program.named_parameters(), [frozen], lr=0.1)
