"""A run that was cut anywhere and went on is, bit for bit, the run that was not."""

import copy
import dataclasses
import fnmatch
import functools
import math
import random
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import graphtune as gt
from graphtune.config import SFTConfig
from graphtune.engine import compile_step
from graphtune.passes import LoRA
from graphtune.training.checkpoint import Checkpointer
from graphtune.training.checkpoint_files import latest
from graphtune.training.flatten import flatten, unflatten
from graphtune.training.optimizers import MuonWithAdamW, OptimizerInBackward
from graphtune.training.state import MAY_CHANGE, TrainState
from tests.oracles.models import random_ids, tiny_model
from tests.oracles.tiny_run import TinyRun, adamw, assert_same_run

STEPS = 8
CPU = torch.device("cpu")


class Averaging(torch.optim.Optimizer):
    """Keeps float32 state beside parameters of any dtype, and numbers in its groups."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "steps": 0, "weight_sum": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] += 1
            group["weight_sum"] += group["lr"] / 3
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.float().clone())
                z.sub_(p.grad.float(), alpha=group["lr"])
                p.copy_(p.float().lerp(z, group["lr"] / 3 / group["weight_sum"]))


class OwnState(torch.optim.SGD):
    """Keeps state where torch's optimizers do not."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.count = 0

    def step(self):
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.grad /= self.count
        super().step()

    def state_dict(self):
        return {"inner": super().state_dict(), "count": self.count}

    def load_state_dict(self, state):
        super().load_state_dict(state["inner"])
        self.count = state["count"]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def named(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def one(kind, **options):
    return lambda model: [kind(trained(model), lr=0.01, **options)]


def torchao(name):
    optim = pytest.importorskip("torchao.optim")
    return one(getattr(optim, name))


def muon_and_adamw(model):
    matrices = [model.hidden.weight]
    rest = [p for p in trained(model) if p is not model.hidden.weight]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.01)]


def in_groups(model):
    groups = [
        {"params": list(model.out.parameters()), "lr": 0.1},
        {"params": [*model.hidden.parameters(), *model.norm.parameters()], "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(groups, lr=0.01, amsgrad=True)]


def in_backward(model):
    return [torch.optim.Adam([p], lr=0.01) for p in trained(model)]


OPTIMIZERS = {
    "adamw": lambda: one(torch.optim.AdamW),
    "adamw foreach": lambda: one(torch.optim.AdamW, foreach=True),
    "adamw fused": lambda: one(torch.optim.AdamW, fused=True),
    "adamw groups": lambda: in_groups,
    "adam tensor lr": lambda: lambda m: [torch.optim.Adam(trained(m), lr=torch.tensor(0.01))],
    "sgd": lambda: one(torch.optim.SGD),
    "sgd momentum": lambda: one(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adafactor": lambda: one(torch.optim.Adafactor),
    "one per parameter": lambda: in_backward,
    "muon and adamw": lambda: muon_and_adamw,
    "muon with adamw": lambda: lambda m: [MuonWithAdamW(named(m), lr=0.01)],
    "in backward": lambda: lambda m: [OptimizerInBackward(*one(torch.optim.AdamW)(m))],
    "averaging": lambda: one(Averaging),
    "own state": lambda: one(OwnState),
    "torchao 8 bit": lambda: torchao("AdamW8bit"),
    "torchao 4 bit": lambda: torchao("AdamW4bit"),
    "torchao fp8": lambda: torchao("AdamWFp8"),
}


@functools.cache
def uninterrupted(name, dtype):
    return TinyRun(OPTIMIZERS[name](), dtype=dtype).until(STEPS)


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(0, STEPS), bf16=st.booleans())
def test_cut_anywhere_it_goes_on_with_the_same_bits(name, tmp_path_factory, cut, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its steps
        expected = uninterrupted(name, dtype)
        with Checkpointer(tmp_path_factory.mktemp("run")) as checkpointer:
            checkpointer.save(TinyRun(OPTIMIZERS[name](), dtype=dtype).until(cut).state)
        other = TinyRun(OPTIMIZERS[name](), dtype=dtype).until((cut + 3) % STEPS)
        resumed = other.restored(latest(checkpointer.folder))
        assert resumed.state.step == cut
        assert_same_run(resumed.until(STEPS), expected)


def test_quantized_optimizer_state_is_saved_as_it_is():
    with torch.compiler.set_stance("force_eager"):
        snapshot = TinyRun(torchao("AdamW8bit")).until(1).state.snapshot()
    names = {name for name in snapshot.tensors if "hidden.weight/exp_avg/" in name}
    assert {name.rpartition("/")[2] for name in names} == {"codes", "scale", "qmap"}
    assert snapshot.tensors[min(names)].dtype == torch.uint8


def test_only_what_trains_and_buffers_that_may_change_are_saved():
    run = TinyRun()
    tensors = run.state.snapshot().tensors
    parameters = {n.partition("/")[2] for n in tensors if n.startswith("parameters/")}
    assert parameters == {f"{m}.{k}" for m in ("norm", "hidden", "out") for k in ("weight", "bias")}
    assert "buffers/norm.running_mean" in tensors
    assert not any("large" in name for name in tensors)
    run.model.large[3] = 1
    assert "buffers/large" in run.state.snapshot().tensors


def test_random_numbers_go_on(tmp_path):
    def draw():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    run = TinyRun()
    random.gauss(0, 1)  # these two remember their next number
    np.random.randn()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(run.state)
    expected = draw()
    draw()
    run.restored(latest(tmp_path))
    assert draw() == expected


captured = functools.cache(lambda: gt.capture(tiny_model("llama")))


def lora_run(rank=2):
    torch.manual_seed(0)
    program = captured().apply(LoRA(rank=rank, dropout=0.1))
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=0.01)
    step = compile_step(program, optimizer, compile=False)
    return TrainState(program, [optimizer]), step


def test_a_program_with_adapters_goes_on_and_refuses_other_passes(tmp_path):
    def train(state, step, until):
        while state.step < until:
            ids = random_ids(2, 7, state.step)
            step({"input_ids": ids, "labels": ids})
            state.step += 1
        return [p.clone() for p in state.program.trainable_parameters()]

    state, step = lora_run()
    train(state, step, 2)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state)
    expected = train(state, step, 4)
    resumed, step = lora_run()
    resumed.restore(latest(tmp_path))
    assert all(map(torch.equal, train(resumed, step, 4), expected))

    other, _ = lora_run(rank=4)
    before = copy.deepcopy(other.snapshot().tensors)
    with pytest.raises(gt.UserError, match=r"passes.0.1.rank` was 2, is 4"):
        other.restore(latest(tmp_path))
    assert all(torch.equal(t, before[n]) for n, t in other.snapshot().tensors.items())


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"optimizer": {"lr": 0.02}, "max_steps": 10}, "`optimizer.lr` was 0.01, is 0.02"),
        ({"optimizer": {"lr": 0.01}, "seed": 1}, "`seed` was 'absent', is 1"),
        ({"optimizer": {"lr": 0.01}, "max_steps": 99, "log_every": 3}, None),
    ],
)
def test_another_config_is_refused_where_it_matters(tmp_path, config, error):
    run = TinyRun()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(run.state)
    run.state.config = config
    if error is None:
        run.state.restore(latest(tmp_path))
    else:
        with pytest.raises(gt.UserError, match=error):
            run.state.restore(latest(tmp_path))


def test_other_optimizers_and_parameters_are_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(TinyRun().state)
    with pytest.raises(gt.UserError, match="AdamW.*SGD"):
        TinyRun(one(torch.optim.SGD)).restored(latest(tmp_path))
    with pytest.raises(gt.UserError, match=r"optimizers.0.groups.0.0"):
        TinyRun(in_groups).restored(latest(tmp_path))
    with pytest.raises(gt.UserError, match=r"float32.*bfloat16"):
        TinyRun(adamw, dtype=torch.bfloat16).restored(latest(tmp_path))


def test_another_version_of_graphtune_is_told(tmp_path, monkeypatch):
    run = TinyRun()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(run.state)
    monkeypatch.setattr("graphtune.training.state.plan_hash", lambda program: "another")
    with pytest.warns(UserWarning, match="was written by graphtune"):
        run.restored(latest(tmp_path))


def test_state_that_cannot_be_written_is_named():
    run = TinyRun()
    run.state.counters["scheduler"] = [{"of": nn.Linear(1, 1)}]
    with pytest.raises(gt.UserError, match="counters/scheduler/0/of is a Linear"):
        run.state.snapshot()


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(DTYPES)
    | st.builds(
        lambda shape, dtype, order: torch.randint(0, 200, shape).to(dtype).permute(order),
        st.lists(st.integers(2, 3), min_size=3, max_size=3),
        st.sampled_from(DTYPES),
        st.permutations(range(3)),
    )
    | st.sampled_from([torch.tensor(1.5), torch.empty(0, 3), torch.arange(6)[::2]])
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers(), inner, max_size=3)
        | st.dictionaries(st.text(alphabet="ab$", max_size=3), inner, max_size=3)
    ),
)


@settings(max_examples=200, deadline=None)
@given(values)
def test_values_come_back_as_they_were(value):
    tensors = {}
    written = flatten(value, tensors, "value")
    assert_same(unflatten(written, tensors, CPU), value)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.stride() == torch.empty_like(expected).stride()
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found)
    else:
        assert found == expected


def test_a_file_cannot_make_us_import_code():
    written = {"$subclass": {"class": "evil.module.Tensor", "inner": {}, "context": []}}
    with pytest.raises(gt.UserError, match="evil.module.Tensor"):
        unflatten(written, {}, CPU)


def test_what_may_change_is_in_the_schema():
    """Each pattern is of keys that configs have, and the others are those that decide the bits."""

    def keys(schema, prefix=""):
        hints = get_type_hints(schema)
        for item in dataclasses.fields(schema):
            yield prefix + item.name
            for part in (hints[item.name], *get_args(hints[item.name])):
                if dataclasses.is_dataclass(part):
                    yield from keys(part, f"{prefix}{item.name}.")

    known = set(keys(SFTConfig))
    for pattern in MAY_CHANGE:
        assert any(fnmatch.fnmatchcase(key, pattern) for key in known), pattern
    fixed = {
        key.partition(".")[0]
        for key in known
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
    }
    assert fixed == {
        *("recipe", "seed", "model", "passes", "dataset", "loader", "optimizer"),
        *("parameter_groups", "lr_scheduler", "optimizer_in_backward", "ema_decay"),
        *("clip_grad_norm", "label_smoothing", "z_loss"),
        "deterministic",
    }
