"""Optimizers against plain PyTorch loops over the model itself, which knows nothing of graphs."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import graphtune as gt
from graphtune.config.instantiate import Component, instantiate
from graphtune.training.ema import start_training
from graphtune.training.optimizers import MuonWithAdamW, OptimizerInBackward
from graphtune.training.parameter_groups import ParameterGroup, parameter_groups
from graphtune.training.schedules import schedule
from tests.oracles.models import assert_same_tensors, random_ids, tiny_model

STEPS = 50


@functools.cache
def captured():
    model = tiny_model("llama")
    return model, gt.capture(model)


def pair():
    """A model, and a program over equal parameters."""
    model, program = captured()
    return copy.deepcopy(model), copy.deepcopy(program)


def data(seed, rows=2):
    ids = random_ids(rows, 10, seed)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 1 + (3 * row + seed) % 7] = -100  # uneven, as answers are
    return {"input_ids": ids, "labels": labels}


def plain_step(model, optimizers, batch):
    logits = model(batch["input_ids"], use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    for one in optimizers:
        one.step()
        one.zero_grad()
    return loss.item()


def named(module):
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def muon_by_hand(model):
    """As torch's documentation has it: two optimizers."""
    embedding = model.get_input_embeddings().weight  # the head is tied to it
    hidden = [p for p in model.parameters() if p.dim() == 2 and p is not embedding]
    rest = [p for p in model.parameters() if p.dim() != 2 or p is embedding]
    muon = torch.optim.Muon(hidden, lr=1e-3, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=5e-4, weight_decay=0.1)]


COMPONENTS = {
    "adamw": ("torch.optim.AdamW", {"lr": 1e-3}),
    "adamw fused": ("torch.optim.AdamW", {"lr": 1e-3, "fused": True}),
    "adamw foreach": ("torch.optim.AdamW", {"lr": 1e-3, "foreach": True}),
    "sgd": ("torch.optim.SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "muon": (
        "graphtune.training.optimizers.MuonWithAdamW",
        {"lr": 1e-3, "adamw_lr": 5e-4},
    ),
    "schedule-free": ("schedulefree.AdamWScheduleFree", {"lr": 1e-3, "warmup_steps": 5}),
    "adamw 8 bit": ("torchao.optim.AdamW8bit", {"lr": 1e-3}),
    "adamw 4 bit": ("torchao.optim.AdamW4bit", {"lr": 1e-3}),
}
# torchao compiles one kernel for each shape.
SLOW = ("adamw 8 bit", "adamw 4 bit")
CASES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in COMPONENTS]


def make(name, parameters):
    path, arguments = COMPONENTS[name]
    pytest.importorskip(path.partition(".")[0])
    optimizer = instantiate(Component(path, arguments, "optimizer"), parameters)
    start_training(optimizer)
    return optimizer


@pytest.mark.parametrize("in_backward", [False, True], ids=["", "in backward"])
@pytest.mark.parametrize("name", CASES)
def test_fifty_losses_are_those_of_a_plain_loop(name, in_backward):
    model, program = pair()
    optimizer = make(name, named(program))
    theirs = muon_by_hand(model) if name == "muon" else [make(name, named(model))]
    if in_backward:
        optimizer = OptimizerInBackward(optimizer)
    schedules = [schedule(o, "cosine", steps=STEPS, warmup_steps=5) for o in (optimizer, *theirs)]
    step = gt.compile_step(program, optimizer, compile=False)
    first = last = 0.0
    for seed in range(STEPS):
        batch = data(seed % 3)
        expected = plain_step(model, theirs, batch)
        found = step(batch)["loss"]
        assert found == pytest.approx(expected, abs=1e-5), f"at step {seed}"
        for one in schedules:
            one.step()
        first, last = first or found, found
    assert last < first - 0.1, "nothing was learned, so that nothing was compared"


def test_accumulation_equals_one_large_batch_for_every_split():
    """Also where a part has no label at all."""
    whole = {key: torch.cat([data(0)[key], data(1)[key], data(2)[key]]) for key in data(0)}
    whole["labels"][3] = -100
    whole["labels"][4, :-1] = -100
    _, program = captured()
    gradients = []
    for sizes in ([6], [3, 3], [1, 1, 1, 1, 1, 1], [2, 1, 3]):
        one = copy.deepcopy(program)
        before = {name: p.detach().clone() for name, p in named(one)}
        parts = {key: value.split(sizes) for key, value in whole.items()}
        batches = [{key: parts[key][i] for key in parts} for i in range(len(sizes))]
        step = gt.compile_step(
            one, torch.optim.SGD(one.trainable_parameters(), lr=1.0), compile=False
        )
        result = step(batches)
        assert result["tokens"] == int((whole["labels"][:, 1:] != -100).sum())
        gradients.append(torch.cat([(before[n] - p).flatten() for n, p in named(one)]).detach())
    for other in gradients[1:]:
        difference = (other - gradients[0]).norm() / gradients[0].norm()
        assert difference < 1e-6


def test_muon_takes_hidden_matrices_and_leaves_the_rest_to_adamw():
    _, program = pair()
    optimizer = MuonWithAdamW(named(program))
    muon, adamw = optimizer.param_groups
    assert all(".self_attn." in name or ".mlp." in name for name in muon["param_names"])
    assert "model.embed_tokens.weight" in adamw["param_names"]
    assert len(muon["params"]) + len(adamw["params"]) == len(named(program))
    with pytest.raises(gt.UserError, match="pairs of name and"):
        MuonWithAdamW(program.trainable_parameters())


def test_muon_keeps_the_ratios_of_parameter_groups():
    _, program = pair()
    later = {"params": [one for one in named(program) if "layers.1" in one[0]], "lr": 2e-3}
    rest = {"params": [one for one in named(program) if "layers.1" not in one[0]]}
    optimizer = MuonWithAdamW([later, rest], lr=1e-3, adamw_lr=1e-4)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([2e-3, 1e-3, 2e-4, 1e-4])


@pytest.mark.parametrize("in_backward", [False, True], ids=["", "in backward"])
@pytest.mark.parametrize("name", ["adamw", "muon", "schedule-free"])
def test_a_resumed_run_has_the_same_bits(name, in_backward):
    def start(program):
        optimizer = make(name, named(program))
        if in_backward:
            optimizer = OptimizerInBackward(optimizer)
        steps = schedule(optimizer, "linear", steps=10, warmup_steps=2)
        return optimizer, steps, gt.compile_step(program, optimizer, compile=False)

    def train(parts, seeds):
        _, scheduler, step = parts
        for seed in seeds:
            step(data(seed))
            scheduler.step()

    _, program = pair()
    parts = start(program)
    train(parts, range(4))
    saved = copy.deepcopy([one.state_dict() for one in (program, *parts[:2])])
    train(parts, range(4, 8))

    _, resumed = pair()
    resumed.load_state_dict(saved[0])
    again = start(resumed)
    for one, state in zip(again[:2], saved[1:], strict=True):
        one.load_state_dict(state)
    train(again, range(4, 8))
    assert_same_tensors(dict(named(resumed)), dict(named(program)))


def test_state_in_backward_is_that_of_one_optimizer():
    """Each can load the other's."""
    states = []
    for wrap in (lambda one: one, OptimizerInBackward):
        _, program = pair()
        groups = parameter_groups(
            program.named_parameters(), [ParameterGroup(("*norm*",), 0.5)], lr=1e-3
        )
        optimizer = wrap(torch.optim.AdamW(groups, lr=1e-3))
        step = gt.compile_step(program, optimizer, compile=False)
        for seed in range(3):
            step(data(seed))
        states.append(optimizer.state_dict())
    plain, inside = states
    assert inside["param_groups"] == plain["param_groups"]
    assert inside["state"].keys() == plain["state"].keys()
    for key, state in plain["state"].items():
        assert_same_tensors(inside["state"][key], state)


def test_in_backward_frees_each_gradient_at_once_and_knows_their_norm():
    model, program = pair()
    optimizer = OptimizerInBackward(torch.optim.SGD(program.trainable_parameters(), lr=0.0))
    alive = []
    for parameter in program.trainable_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in program.parameters()))
        )
    F.cross_entropy(program(data(0)["input_ids"]).flatten(0, 1), random_ids(1, 20)[0]).backward()
    assert alive and max(alive) == 0
    logits = model(data(0)["input_ids"], use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), random_ids(1, 20)[0]).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(optimizer.grad_norm(), expected)
    optimizer.step()
    assert optimizer.grad_norm() == 0


def test_in_backward_refuses_clipping_and_accumulation_and_can_be_removed():
    _, program = pair()
    optimizer = OptimizerInBackward(torch.optim.SGD(program.trainable_parameters(), lr=0.1))
    with pytest.raises(gt.UserError, match="clip_grad_norm=null"):
        gt.compile_step(program, optimizer, clip_grad_norm=1.0)
    step = gt.compile_step(program, optimizer, compile=False)
    with pytest.raises(gt.UserError, match="gradient_accumulation_steps=1"):
        step([data(0), data(1)])
    optimizer.remove()
    program(data(0)["input_ids"]).sum().backward()
    assert all(p.grad is not None for p in program.trainable_parameters())


@pytest.mark.slow
def test_in_backward_of_a_compiled_step_learns_the_same():
    runs = []
    for compile in (False, True):
        torch._dynamo.reset()
        _, program = pair()
        optimizer = OptimizerInBackward(torch.optim.AdamW(named(program), lr=1e-3))
        step = gt.compile_step(program, optimizer, compile=compile)
        step.check(data(0))  # which takes no step
        runs.append([step(data(seed))["loss"] for seed in range(5)])
        assert all(p.grad is None for p in program.parameters())
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)


def test_a_package_that_is_missing_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(gt.UserError, match="schedulefree"):
        instantiate(Component("schedulefree.AdamWScheduleFree", {}, "optimizer"), [])
