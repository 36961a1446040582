"""What a run does besides taking steps: measure, stop, keep, log; and what with bad steps."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from graphtune.config.instantiate import Component
from graphtune.engine import NotFinite, TrainStep, compile_step
from graphtune.recipes import load_run, sft
from graphtune.recipes.job import in_one_call
from graphtune.training.checkpoint_files import checkpoints, metric_of
from tests.oracles.command_line import changed, graphtune, lines, metrics, trained, write_config
from tests.oracles.models import assert_same_tensors


@pytest.fixture
def train(quick, tmp_path):
    """Run the recipe in a folder of the given name; its exit code."""

    def run(*changes, name="run", words=()):
        path = write_config(tmp_path / "config.yaml", changed(quick, *changes))
        return graphtune("train", path, f"output_dir={tmp_path / name}", *words)

    return run


def heldout_losses(monkeypatch, losses):
    """Let the held-out loss be one of `losses` after the other."""
    left = iter(losses)
    monkeypatch.setattr(sft, "evaluate_loss", lambda *_: next(left))


def test_the_held_out_loss_is_that_of_the_weights_at_that_step(train, quick, tmp_path):
    """A run that stops there measures the same after training."""
    validated = {"dataset_val": quick["dataset"], "validate_every": 3}
    assert train(validated) == 0
    found = {m["step"]: m["heldout_loss"] for m in metrics(tmp_path / "run") if "heldout_loss" in m}
    assert list(found) == [3, 6]
    options = {"lr_scheduler": {"name": "constant"}}
    assert train(validated, options, name="long") == 0
    assert train(validated, options, {"max_steps": 3}, name="short") == 0
    long, short = tmp_path / "long", tmp_path / "short"
    (loss,) = [m["heldout_loss"] for m in metrics(long) if m["step"] == 3]
    assert json.loads((short / "summary.json").read_text())["after"]["heldout_loss"] == loss
    assert train(name="without", words=["lr_scheduler.name=constant"]) == 0
    without = metrics(tmp_path / "without")
    assert [m["loss"] for m in without] == [m["loss"] for m in metrics(long)], "it only measures"


def test_early_stopping_counts_validations_without_a_new_best(train, quick, tmp_path, monkeypatch):
    heldout_losses(monkeypatch, [9.0, 5.0, 4.0, 4.5, 3.95, 3.0, 9.0])  # the first is that before
    options = {"validate_every": 1, "early_stopping": {"patience": 2, "min_delta": 0.1}}
    options |= {"dataset_val": quick["dataset"], "log_every": 10}
    assert train(options) == 0
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["train"]["steps"] == 4


def test_the_best_checkpoints_are_kept(train, quick, tmp_path, monkeypatch):
    heldout_losses(monkeypatch, [9.0, 5.0, 3.0, 4.0, 6.0, 9.0])
    options = {"validate_every": 2, "dataset_val": quick["dataset"]}
    options |= {"checkpoint": {"keep_best": 2, "keep_last": 1}}
    assert train(options) == 0
    kept = {one.name: metric_of(one) for one in checkpoints(tmp_path / "run" / "checkpoints")}
    assert kept == {"step-00000004": 3.0, "step-00000006": 4.0, "step-00000008": 6.0}


def test_samples_are_written_and_change_nothing(train, tmp_path, capsys):
    options = {"samples": {"prompts": ["What is 1?", "No [b]"], "every_steps": 4}}
    dropout = {"passes": {"lora": {"dropout": 0.1}}}
    assert train(options, dropout, words=["samples.max_new_tokens=3"]) == 0
    assert "No [b]" in capsys.readouterr().out
    assert train(dropout, name="without") == 0
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert [(s["step"], s["prompt"]) for s in samples] == [
        (step, prompt) for step in (4, 8) for prompt in ("What is 1?", "No [b]")
    ]
    assert_same_tensors(trained(tmp_path / "run"), trained(tmp_path / "without"))
    assert train({"samples": {"prompts": ["hi", "word " * 99]}}, name="long") == 2
    said = capsys.readouterr().err
    assert "samples.prompts[1]" in said and "128 positions" in said


def test_profile_and_several_loggers_and_few_lines(train, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    options = {"profile": {"start": 2, "steps": 2, "memory": True}, "log_every": 3}
    options |= {"loggers": {"stdout": {}, "tensorboard": {}}}
    assert train(options) == 0
    run = tmp_path / "run"
    assert [m["step"] for m in metrics(run)] == [3, 6, 8], "and the last"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 6  ")]
    assert len(said) == 1 and "grad_norm" in said[0]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [3, 6, 8]
    assert events.Scalars("loss")[1].value == pytest.approx(metrics(run)[1]["loss"])
    trace = json.loads((run / "profile.json").read_text())["traceEvents"]
    matmuls = [e for e in trace if e.get("name") in ("aten::mm", "aten::addmm")]
    assert matmuls and any(e.get("name") == "[memory]" for e in trace)


def with_bad_loss(monkeypatch, step, factor):
    """Multiply the loss of a step, counted from 1."""
    count = []
    real = TrainStep.__call__

    def call(self, batch, **options):
        count.append(1)
        plain = self.loss
        if len(count) == step:
            self.loss = lambda *given: plain(*given) * factor
        try:
            return real(self, batch, **options)
        finally:
            self.loss = plain

    monkeypatch.setattr(TrainStep, "__call__", call)


def states(monkeypatch):
    """Copies of what trains, the averages and Adam's moments, after each step."""
    found = []
    real = sft.take_step

    def step(training, group, run):
        result = real(training, group, run)
        named = {n: p.detach().clone() for n, p in training.program.named_parameters()}
        named |= {f"average of {n}": a.clone() for n, a in training.ema.averages.items()}
        moments = training.optimizer.state.values()
        named |= {f"moment {i}": s["exp_avg"].clone() for i, s in enumerate(moments)}
        found.append(named)
        return result

    monkeypatch.setattr(sft, "take_step", step)
    return found


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_spike_is_left_out_and_counted(train, tmp_path, monkeypatch, in_backward):
    after = states(monkeypatch)
    with_bad_loss(monkeypatch, 5, 1e3)
    options = {"skip_spikes": {"factor": 2, "window": 3}, "ema_decay": 0.5}
    words = [f"optimizer_in_backward={in_backward}", "clip_grad_norm=null"]
    assert train(options, words=words) == 0
    run = tmp_path / "run"
    found = metrics(run)
    assert [m["skipped_steps"] for m in found] == [0] * 4 + [1] * 4
    assert found[4]["loss"] > 100 * found[3]["loss"]
    assert_same_tensors(after[4], after[3])
    assert not torch.equal(*(list(one.values())[-1] for one in after[4:6])), "it went on"
    assert json.loads((run / "summary.json").read_text())["train"]["skipped_steps"] == 1
    monkeypatch.undo()


def poison(monkeypatch, step):
    """From a step on, batches of that step's second sequence have a loss that is no number."""
    real, seen = TrainStep.__init__, []

    def init(self, *given, **options):
        real(self, *given, **options)
        plain, calls = self.loss, []

        def loss(logits, labels, weights=None):
            calls.append(1)
            if len(calls) == step:
                seen.append(labels.clone())
            known = bool(seen) and labels.shape == seen[0].shape and torch.equal(labels, seen[0])
            return plain(logits, labels, weights) * (float("nan") if known else 1.0)

        self.loss = loss

    monkeypatch.setattr(TrainStep, "__init__", init)


@pytest.mark.parametrize("in_backward", [False, True])
def test_no_number_stops_the_run_with_the_last_good_weights(
    train, tmp_path, monkeypatch, capsys, in_backward
):
    words = [f"optimizer_in_backward={in_backward}", "clip_grad_norm=null"]
    options = {"lr_scheduler": {"name": "constant"}}
    assert train(options, {"max_steps": 4}, name="good", words=words) == 0
    poison(monkeypatch, 5)
    capsys.readouterr()
    assert train(options, words=words) == 1
    run, good = tmp_path / "run", tmp_path / "good"
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "step 5: the loss is nan" in said[0] and "bad_batch_step_5" in said[0]
    assert metrics(run) == metrics(good)
    assert_same_tensors(trained(run), trained(good))
    assert not (run / "summary.json").exists()

    # The batch is all that is needed to see it again.
    program, _ = load_run(run)
    for name, parameter in program.named_parameters():
        parameter.requires_grad_("lora" in name)
    optimizer = torch.optim.SGD(program.trainable_parameters(), lr=0.1)
    step = compile_step(program, optimizer, compile=False)
    batch = {
        name.removeprefix("0."): tensor
        for name, tensor in load_file(run / "bad_batch_step_5.safetensors").items()
    }
    before = copy.deepcopy(program.state_dict())
    with pytest.raises(NotFinite):
        step(batch)
    assert_same_tensors(dict(program.state_dict()), dict(before))


def test_a_gradient_that_is_no_number_never_reaches_a_weight(train, tmp_path, monkeypatch, capsys):
    """Where each gradient is used at once, and the loss looks good."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    real, calls = TrainStep._plain_loss_sum, []

    def loss_sum(self, batch):
        calls.append(1)
        loss = real(self, batch)
        return Broken.apply(loss) if len(calls) == 3 else loss

    monkeypatch.setattr(TrainStep, "_plain_loss_sum", loss_sum)
    assert train(words=["optimizer_in_backward=true", "clip_grad_norm=null"]) == 1
    assert "step 3: the loss is" in capsys.readouterr().err
    assert all(tensor.isfinite().all() for tensor in trained(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["validate_every=2"], "`validate_every` needs held-out data"),
        (["early_stopping.patience=2", "dataset_val=${dataset}"], "needs `validate_every`"),
        (["optimizer_in_backward=true"], "clip_grad_norm=null"),
        (["parameter_groups=[{parameters: [nothing]}]"], "parameter_groups[0].parameters"),
        (["loggers.wandbb.a=1"], "did you mean `wandb`?"),
        (["lr_scheduler={name: wsd, warmup_steps: 7, decay_ratio: 0.5}"], "of the run's 8"),
        (["dataset.streaming=true", "max_steps=null"], "`max_steps` must be set"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_loaded(
    train, tmp_path, monkeypatch, capsys, words, said
):
    monkeypatch.setattr(sft, "load_weights", lambda *_, **__: pytest.fail("loaded"))
    assert train(words=words) == 2
    assert said in capsys.readouterr().err.replace("more than the run's", "of the run's")
    assert not (tmp_path / "run").exists(), "and the folder can be used"


@pytest.mark.parametrize(
    ("path", "given", "arguments"),
    [
        ("torch.optim.AdamW", {"lr": 0.1}, {"lr": 0.1, "foreach": True}),
        ("torch.optim.AdamW", {"foreach": False}, {"foreach": False}),
        ("torch.optim.AdamW", {"fused": True}, {"fused": True}),
        ("torch.optim.SparseAdam", {}, {}),
        ("schedulefree.AdamWScheduleFree", {}, {}),
    ],
)
def test_optimizers_of_torch_update_all_parameters_together(path, given, arguments):
    assert in_one_call(Component(path, given, "optimizer")).arguments == arguments


@pytest.mark.parametrize("path", ["torch.optim.AdamW", "torch.optim.Adam", "torch.optim.SGD"])
def test_together_they_get_the_same_bits(path):
    def trained(component):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 33), (33, 8), (5,))]
        optimizer = component.build(parameters)
        for _ in range(9):
            for one in parameters:
                one.grad = torch.randn_like(one)
            optimizer.step()
        return dict(enumerate(parameters))

    alone = Component(path, {"lr": 1e-2, "weight_decay": 0.1}, "optimizer")
    assert_same_tensors(trained(in_one_call(alone)), trained(alone))
