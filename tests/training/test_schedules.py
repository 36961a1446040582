"""Schedules against their closed forms."""

import math

import pytest
import torch

from graphtune.training.schedules import schedule


def rates(name, steps, warmup_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = schedule(optimizer, name, steps=steps, warmup_steps=warmup_steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warm_up_rises_linearly_to_the_full_rate(name):
    seen = rates(name, 20, 4)
    assert seen[:4] == pytest.approx([2 * (i + 1) / 5 for i in range(4)])
    assert seen[4] == pytest.approx(2.0)


def test_after_warm_up():
    parts = [i / 16 for i in range(16)]
    assert rates("cosine", 20, 4)[4:] == pytest.approx([1 + math.cos(math.pi * p) for p in parts])
    assert rates("linear", 20, 4)[4:] == pytest.approx([2 * (1 - p) for p in parts])
    assert rates("constant", 20, 4)[4:] == pytest.approx([2.0] * 16)


def test_no_warm_up_starts_at_the_full_rate():
    assert rates("cosine", 5, 0)[0] == pytest.approx(2.0)
