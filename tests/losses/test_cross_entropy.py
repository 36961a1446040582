"""The options of the cross entropy against their closed forms."""

import functools

import pytest
import torch
import torch.nn.functional as F

import graphtune as gt
from graphtune.losses import cross_entropy
from tests.oracles.models import random_ids, tiny_model

SMOOTHING, Z = 0.1, 1e-2


def example(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(3, 7, 11, generator=generator) * 4).requires_grad_()
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[0, :4] = labels[2] = -100
    weights = torch.rand(3, 7, generator=generator)
    return logits, labels, weights


def by_hand(logits, labels, weights, smoothing, z):
    """Token by token, from the definitions."""
    total = torch.zeros(())
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            label = labels[row, position + 1]
            if label == -100:
                continue
            x = logits[row, position]
            log_z = x.exp().sum().log()
            entropy = (1 - smoothing) * (log_z - x[label]) + smoothing * (log_z - x).mean()
            weight = 1.0 if weights is None else weights[row, position + 1]
            total = total + weight * (entropy + z * log_z**2)
    return total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
@pytest.mark.parametrize("z", [0.0, Z])
def test_loss_and_gradient_are_the_definitions(smoothing, z, weighted):
    logits, labels, weights = example()
    weights = weights if weighted else None
    found = cross_entropy(logits, labels, weights, label_smoothing=smoothing, z_loss=z)
    expected = by_hand(logits, labels, weights, smoothing, z)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_smoothing_is_torchs_and_no_option_is_the_plain_loss():
    logits, labels, _ = example()
    flat, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    for smoothing in (0.0, SMOOTHING):
        expected = F.cross_entropy(flat, targets, reduction="sum", label_smoothing=smoothing)
        torch.testing.assert_close(
            cross_entropy(logits, labels, label_smoothing=smoothing), expected
        )


def test_what_is_ignored_cannot_spoil_the_z_loss():
    logits, labels, _ = example()
    spoiled = logits.detach().clone()
    spoiled[2] = float("inf")  # a row without labels
    assert cross_entropy(spoiled, labels, z_loss=Z).isfinite()
    assert torch.equal(
        cross_entropy(spoiled, labels, z_loss=Z), cross_entropy(logits, labels, z_loss=Z)
    )


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_trains_on_the_loss_it_is_given(compile):
    torch._dynamo.reset()
    loss = functools.partial(cross_entropy, label_smoothing=SMOOTHING, z_loss=Z)
    program = gt.capture(tiny_model("llama"))
    optimizer = torch.optim.SGD(program.trainable_parameters(), lr=0.0)
    step = gt.compile_step(program, optimizer, compile=compile, loss=loss)
    ids = random_ids(2, 9)
    result = step({"input_ids": ids, "labels": ids})
    expected = by_hand(program(ids), ids, None, SMOOTHING, Z).item() / result["tokens"]
    assert result["loss"] == pytest.approx(expected, rel=1e-5)
