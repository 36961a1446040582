"""EMA against torch's, and the weights that are evaluated in place of those that train."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import graphtune as gt
from graphtune.training.ema import EMA, evaluation_weights, start_training
from graphtune.training.optimizers import OptimizerInBackward
from tests.oracles.models import assert_same_tensors


def small(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    model[0].weight.requires_grad_(False)
    return model


def learn(model, optimizer, seed):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    model(x.to(model[0].weight.dtype)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(steps=20):
    model = small()
    ema = EMA(model.named_parameters(), decay=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for seed in range(steps):
        learn(model, optimizer, seed)
        ema.update()
    return model, ema, optimizer


def test_average_is_torchs():
    model = small()
    ema = EMA(model.named_parameters(), decay=0.9)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(model)  # its first update copies
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for seed in range(20):
        learn(model, optimizer, seed)
        ema.update()
        reference.update_parameters(model)
    expected = dict(reference.module.named_parameters())
    frozen = expected.pop("0.weight")
    assert torch.equal(frozen, model[0].weight)
    assert_same_tensors(ema.state_dict(), expected)


def test_swapped_in_and_out_with_the_same_bits():
    model, ema, _ = trained()
    before = values(model)
    with ema.swapped():
        inside = values(model)
        assert_same_tensors(
            {name: p for name, p in inside.items() if name != "0.weight"}, ema.state_dict()
        )
        assert torch.is_grad_enabled()
    assert_same_tensors(values(model), before)
    with pytest.raises(KeyError), ema.swapped():
        raise KeyError
    assert_same_tensors(values(model), before), "after an error too"


def test_half_precision_is_averaged_in_float32():
    model = small(torch.bfloat16)
    ema = EMA(model.named_parameters(), decay=0.999)
    start = ema.state_dict()["2.bias"].clone()
    with torch.no_grad():
        model[2].bias.add_(1.0)
    moved = model[2].bias.detach().float() - start
    for _ in range(100):
        ema.update()
    change = ema.state_dict()["2.bias"] - start
    torch.testing.assert_close(change, moved * (1 - 0.999**100), rtol=1e-4, atol=1e-6)
    with ema.swapped():
        assert model[2].bias.dtype == torch.bfloat16


def test_state_goes_on_by_name():
    model, ema, _ = trained()
    again = EMA(reversed(list(small().named_parameters())), decay=0.9)
    again.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert_same_tensors(again.state_dict(), ema.state_dict())
    state = ema.state_dict()
    with pytest.raises(gt.UserError, match="'2.bias'"):
        again.load_state_dict({name: t for name, t in state.items() if name != "2.bias"})
    with pytest.raises(gt.UserError, match="shape"):
        again.load_state_dict(state | {"2.bias": torch.zeros(3)})


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(gt.UserError, match="ema.decay"):
        EMA(small().named_parameters(), decay=decay)


def test_evaluation_weights_are_the_averages_or_the_parameters():
    model, ema, optimizer = trained()
    before = values(model)
    with evaluation_weights(optimizer):
        assert_same_tensors(values(model), before)
    with evaluation_weights(optimizer, ema):
        assert torch.equal(model[2].bias, ema.state_dict()["2.bias"])
    assert_same_tensors(values(model), before)


@pytest.mark.parametrize("wrap", [lambda one: one, OptimizerInBackward], ids=["", "in backward"])
def test_a_schedule_free_run_is_not_changed_by_evaluation(wrap):
    schedulefree = pytest.importorskip("schedulefree")
    ends = []
    for evaluates in (False, True):
        model = small()
        inner = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
        optimizer = wrap(inner)
        start_training(optimizer)
        for seed in range(10):
            learn(model, optimizer, seed)
            if evaluates:
                with evaluation_weights(optimizer):
                    y, z = values(model)["2.bias"], inner.state[model[2].bias]["z"]
                # x is what is evaluated: y = beta x + (1 - beta) z
                torch.testing.assert_close(0.9 * y + 0.1 * z, model[2].bias.detach())
        ends.append(values(model))
    assert_same_tensors(*ends)
