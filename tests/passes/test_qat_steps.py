"""Training steps of QAT: switched on at a step, checkpointed, compiled, checked."""

import functools

import pytest
import torch

import graphtune as gt
from graphtune.compilation import ROUND
from graphtune.fake_quantization import fake_quantize_weight
from graphtune.passes import QAT, ActivationCheckpoint, LoRA
from graphtune.passes.qat import ENABLED, at_step
from tests.oracles.models import assert_same_tensors, gradients, random_ids, tiny_model
from tests.passes.test_composition import shake

IDS = random_ids(2, 9)
BATCH = {"input_ids": IDS, "labels": IDS}


@functools.cache
def llama():
    """A program that no test changes."""
    return gt.capture(tiny_model("llama"))


def test_begins_at_a_step_without_compiling_again():
    base = llama()
    program = base.apply(QAT(scale_dtype="weight", group_size=16, enabled_from_step=2))
    expected = base.apply(QAT(scale_dtype="weight", group_size=16))
    for step in (0, 1, 2, 3):
        at_step(program, step)
        logits = program(IDS)
        reference = expected if step >= 2 else base
        assert torch.equal(logits, reference(IDS))
        assert_same_tensors(gradients(logits, program), gradients(reference(IDS), reference))
    assert ENABLED not in program.state_dict()  # no key of the model's
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    for step in (0, 2):
        at_step(program, step)
        torch.testing.assert_close(compiled(IDS), program(IDS))
    assert len(calls) == 1


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointed_layers_give_the_same_gradients(lora):
    base = llama()
    passes = [QAT(scale_dtype="weight", group_size=16), *([LoRA(rank=2)] if lora else [])]
    steps = []
    for more in ([], [ActivationCheckpoint("full")]):
        torch.manual_seed(0)
        program = base.apply(*passes, *more)
        shake(program) if lora else None
        optimizer = torch.optim.SGD(program.trainable_parameters(), lr=0.1)
        steps.append(gt.compile_step(program, optimizer, compile=False))
    found, expected = (torch.autograd.grad(step.loss_sum(BATCH), step.parameters) for step in steps)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_compiled_code_rounds_scales_as_the_graph_does():
    weight = torch.randn(64, 64, requires_grad=True)

    def rounded(weight):
        return fake_quantize_weight(weight, -1, 32, 4, True)

    found, expected = torch.compile(rounded, options=ROUND)(weight), rounded(weight)
    assert torch.equal(found, expected)
    up = torch.randn(64, 64)
    (mine,), (theirs,) = (torch.autograd.grad(one, weight, up) for one in (found, expected))
    assert torch.equal(mine, theirs)


def test_gradients_are_checked_as_a_whole_where_inputs_are_rounded(monkeypatch):
    program = llama().apply(QAT(group_size=16))
    optimizer = torch.optim.SGD(program.trainable_parameters(), lr=0.1)
    step = gt.compile_step(program, optimizer, compile=False)
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    assert step.check(BATCH) == 0
    assert_same_tensors(program.state_dict(), before)
    right = step.loss_sum
    # The same loss, and a gradient half again as long.
    monkeypatch.setattr(step, "loss_sum", lambda b: right(b) * 1.5 - right(b).detach() / 2)
    with pytest.raises(RuntimeError, match="all parameters together"):
        step.check(BATCH)


@pytest.mark.slow
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "weight"])
def test_compiled_step(scale_dtype):
    program = llama().apply(QAT(scale_dtype=scale_dtype, group_size=16))
    step = gt.compile_step(program, torch.optim.SGD(program.trainable_parameters(), lr=0.1))
    assert step.check(BATCH) < 1e-4
    before = step(BATCH)["loss"]
    assert step(BATCH)["loss"] < before
