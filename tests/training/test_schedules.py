"""Schedules against transformers', and against what they promise."""

import pytest
import torch
from transformers import get_scheduler

import graphtune as gt
from graphtune.training.schedules import schedule

STEPS, WARMUP, DECAY, FLOOR = 40, 6, 10, 0.1
# Name -> our options, the name that transformers has for it, its options.
SAME = {
    "cosine": ({}, "cosine", {}),
    "cosine with a floor": (
        {"min_ratio": FLOOR},
        "cosine_with_min_lr",
        {"min_lr_rate": FLOOR},
    ),
    "linear": ({}, "linear", {}),
    "constant": ({}, "constant_with_warmup", {}),
    "wsd": (
        {"decay_steps": DECAY},
        "warmup_stable_decay",
        {"num_decay_steps": DECAY, "decay_type": "1-sqrt"},
    ),
    "wsd with a floor": (
        {"decay_steps": DECAY, "min_ratio": FLOOR},
        "warmup_stable_decay",
        {"num_decay_steps": DECAY, "decay_type": "1-sqrt", "min_lr_ratio": FLOOR},
    ),
    "inverse_sqrt": ({}, "inverse_sqrt", {}),
}


def make_optimizer():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)


def rates(scheduler, optimizer, steps):
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def ours(name, warmup=WARMUP, **options):
    optimizer = make_optimizer()
    made = schedule(optimizer, name, steps=STEPS, warmup_steps=warmup, **options)
    return rates(made, optimizer, STEPS)


@pytest.mark.parametrize("case", SAME)
def test_rates_are_transformers_without_its_first_step(case):
    """Whose first rate is zero: its warm-up and its run are one step longer."""
    options, theirs, their_options = SAME[case]
    optimizer = make_optimizer()
    reference = get_scheduler(
        theirs, optimizer, WARMUP + 1, STEPS + 1, scheduler_specific_kwargs=their_options
    )
    zero, *expected = rates(reference, optimizer, STEPS + 1)
    found = ours(case.split()[0], **options)
    # transformers' warm-up of wsd starts at its floor, ours at zero
    start = WARMUP if case == "wsd with a floor" else 0
    assert found[start:] == pytest.approx(expected[start:], rel=1e-12)
    assert zero == 0 or start


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
def test_warm_up_rises_linearly_to_the_full_rate(name):
    seen = ours(name, warmup=4, min_ratio=0.5)
    assert seen[:5] == pytest.approx([2 * (i + 1) / 5 for i in range(5)])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd", "inverse_sqrt"])
def test_no_warm_up_starts_at_the_full_rate(name):
    assert ours(name, warmup=0)[0] == pytest.approx(2.0)


def test_inverse_sqrt_without_warm_up_is_transformers():
    optimizer = make_optimizer()
    expected = rates(get_scheduler("inverse_sqrt", optimizer, 0), optimizer, STEPS)
    assert ours("inverse_sqrt", warmup=0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_what_falls_keeps_above_its_floor(name):
    seen = ours(name, min_ratio=FLOOR, decay_steps=DECAY)
    assert 2 * FLOOR < seen[-1] < 0.5
    optimizer = make_optimizer()
    made = schedule(optimizer, name, steps=9, warmup_steps=2, min_ratio=FLOOR, decay_steps=3)
    assert rates(made, optimizer, 12)[9:] == pytest.approx([2 * FLOOR] * 3), "after the end"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cosin"}, "one of cosine, linear"),
        ({"min_ratio": 1.5}, r"min_ratio=1.5"),
        ({"name": "wsd", "decay_steps": 36}, "6 steps of warm-up and 36 of decay"),
    ],
)
def test_refusals(options, message):
    options = {"name": "cosine", "steps": STEPS, "warmup_steps": WARMUP} | options
    with pytest.raises(gt.UserError, match=message):
        schedule(make_optimizer(), **options)
