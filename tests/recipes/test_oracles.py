"""What a run of the recipe does, against plain PyTorch loops over transformers' and PEFT's models.

The loops take the batches that the recipe took; everything else is written out here.
"""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from graphtune.data.collation import attention_mask
from graphtune.recipes import sft
from tests.oracles.command_line import changed, graphtune, metrics, trained, write_config
from tests.oracles.models import assert_same_tensors
from tests.oracles.peft import peft_model, trainable

STEPS = 50
FULL = {"passes": {"lora": None, "full": {}}, "optimizer": {"lr": 2e-3}}
LORA = {"passes": {"lora": {"rank": 4, "alpha": 8}}, "optimizer": {"lr": 1e-2}}
LONG = {"max_steps": STEPS, "epochs": 99}


class Recorded:
    """What happened in a run: the parameters and the random numbers that it began with, each
    step's batches, and the parameters after each step."""

    def __init__(self, monkeypatch):
        self.groups, self.after = [], []
        warm_up, take_step = sft.warm_up, sft.take_step

        def begin(training):
            warm_up(training)
            self.start, self.rng = parameters(training), torch.get_rng_state()

        def step(training, group, run):
            self.groups.append(copy.deepcopy(group))
            result = take_step(training, group, run)
            self.after.append(parameters(training))
            return result

        monkeypatch.setattr(sft, "warm_up", begin)
        monkeypatch.setattr(sft, "take_step", step)


def parameters(training):
    named = training.program.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


@pytest.fixture
def trained_by(quick, tmp_path, monkeypatch):
    """Run the recipe; its lines of metrics and what was recorded."""

    def run(*changes, words=()):
        recorded = Recorded(monkeypatch)
        path = write_config(tmp_path / "config.yaml", changed(quick, *changes))
        assert graphtune("train", path, *words) == 0
        return metrics(tmp_path / "run"), recorded

    return run


def oracle(folder, recorded, *, adapters):
    """A model that is not ours, with the parameters that the run began with, by our names."""
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    if adapters:
        model = peft_model(model, r=4, lora_alpha=8)
        named = trainable(model)
    else:
        named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in recorded.start.items():
            named[name].copy_(value)
    assert recorded.start.keys() == named.keys()
    return model, named


def cosine(step, warmup=1):
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


def summed_loss(model, batch, smoothing=0.0, z_loss=0.0):
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=attention_mask(batch["position_ids"]),
        position_ids=batch["position_ids"],
        use_cache=False,
    ).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    known = labels != -100
    log_z = logits[known].logsumexp(-1)
    right = logits[known].gather(-1, labels[known][:, None])[:, 0]
    loss = (1 - smoothing) * (log_z - right) + smoothing * (log_z - logits[known].mean(-1))
    return (loss + z_loss * log_z**2).sum()


def plain_losses(model, optimizers, recorded, *, clip=None, **loss_options):
    """The loss and the gradient's norm of each step."""
    base = [[group["lr"] for group in one.param_groups] for one in optimizers]
    weights = [p for one in optimizers for group in one.param_groups for p in group["params"]]
    found = []
    for step, group in enumerate(recorded.groups):
        for one, rates in zip(optimizers, base, strict=True):
            for part, rate in zip(one.param_groups, rates, strict=True):
                part["lr"] = rate * cosine(step)
        tokens = sum(int((one["labels"][:, 1:] != -100).sum()) for one in group)
        loss = 0.0
        for batch in group:
            part = summed_loss(model, batch, **loss_options) / tokens
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(weights, clip or math.inf)
        for one in optimizers:
            one.step()
            one.zero_grad()
        found.append((loss, norm.item()))
    return found


def assert_same_trajectory(lines, expected, within=1e-5):
    assert len(lines) == len(expected) == STEPS
    for step, (line, (loss, norm)) in enumerate(zip(lines, expected, strict=True)):
        assert line["loss"] == pytest.approx(loss, abs=within), f"at step {step}"
        assert line["grad_norm"] == pytest.approx(norm, rel=100 * within), f"at step {step}"
        assert line["lr"] / lines[1]["lr"] == pytest.approx(cosine(step), abs=1e-7)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5, "nothing was learned to compare"


def test_full_fine_tuning_is_a_plain_loop_over_transformers(trained_by, model_folder):
    """With clipping that acts, accumulation, and batches of several sequences to a row."""
    options = {"clip_grad_norm": 0.5, "gradient_accumulation_steps": 2}
    lines, recorded = trained_by(FULL, LONG, options)
    model, named = oracle(model_folder, recorded, adapters=False)
    adamw = torch.optim.AdamW(named.values(), lr=2e-3)
    expected = plain_losses(model, [adamw], recorded, clip=0.5)
    assert_same_trajectory(lines, expected)
    assert max(norm for _, norm in expected) > 0.5 and len(recorded.groups[0]) == 2


def test_lora_is_peft(trained_by, model_folder):
    options = {"gradient_accumulation_steps": 2, "loader": {"mode": "bucketed", "shapes": 2}}
    lines, recorded = trained_by(LORA, LONG, options)
    model, named = oracle(model_folder, recorded, adapters=True)
    adamw = torch.optim.AdamW(named.values(), lr=1e-2)
    assert_same_trajectory(lines, plain_losses(model, [adamw], recorded, clip=1.0))
    assert all("lora" in name for name in named)


def test_label_smoothing_and_z_loss(trained_by, model_folder):
    lines, recorded = trained_by(FULL, LONG, {"label_smoothing": 0.1, "z_loss": 1e-3})
    model, named = oracle(model_folder, recorded, adapters=False)
    adamw = torch.optim.AdamW(named.values(), lr=2e-3)
    expected = plain_losses(model, [adamw], recorded, clip=1.0, smoothing=0.1, z_loss=1e-3)
    assert_same_trajectory(lines, expected)


def test_lora_plus_is_a_group_with_a_rate_of_its_own(trained_by, model_folder):
    groups = [{"parameters": ["*.lora_B.*"], "lr_ratio": 16, "weight_decay": 0.1}]
    options = {"parameter_groups": groups, "optimizer": {"lr": 1e-3, "weight_decay": 0.0}}
    lines, recorded = trained_by(LORA, LONG, options)
    model, named = oracle(model_folder, recorded, adapters=True)
    b = [p for name, p in named.items() if ".lora_B." in name]
    a = [p for name, p in named.items() if ".lora_A." in name]
    adamw = torch.optim.AdamW(
        [{"params": b, "lr": 16e-3, "weight_decay": 0.1}, {"params": a}], lr=1e-3, weight_decay=0.0
    )
    assert_same_trajectory(lines, plain_losses(model, [adamw], recorded, clip=1.0))


def test_neftune_adds_the_papers_noise_to_embedded_tokens(trained_by, model_folder):
    lines, recorded = trained_by(FULL, {"passes": {"neftune": {"alpha": 5}}}, LONG)
    model, named = oracle(model_folder, recorded, adapters=False)

    def noisy(module, given, embedded):
        size = 5 / math.sqrt(embedded.shape[1] * embedded.shape[2])
        return embedded + torch.empty_like(embedded).uniform_(-size, size)

    model.get_input_embeddings().register_forward_hook(noisy)
    torch.set_rng_state(recorded.rng)
    adamw = torch.optim.AdamW(named.values(), lr=2e-3)
    assert_same_trajectory(lines, plain_losses(model, [adamw], recorded, clip=1.0))


def test_muon_with_adamw_is_torchs_two_optimizers(trained_by, model_folder):
    optimizer = {
        "_component_": "graphtune.training.optimizers.MuonWithAdamW",
        "lr": 2e-3,
        "adamw_lr": 1e-3,
    }
    lines, recorded = trained_by(FULL, LONG, {"optimizer": None}, {"optimizer": optimizer})
    model, named = oracle(model_folder, recorded, adapters=False)
    hidden = [p for name, p in named.items() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in named.items() if p.dim() == 1 or "embed" in name]
    muon = torch.optim.Muon(hidden, lr=2e-3, adjust_lr_fn="match_rms_adamw", weight_decay=0.1)
    adamw = torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.1)
    # Muon's iterations run in bfloat16, which makes more of a last bit's difference.
    expected = plain_losses(model, [muon, adamw], recorded, clip=1.0)
    assert_same_trajectory(lines, expected, within=3e-4)


OPTIMIZERS = [
    pytest.param("torchao.optim.AdamW8bit", marks=pytest.mark.slow),  # which compiles its kernels
    "schedulefree.AdamWScheduleFree",
]


@pytest.mark.parametrize("component", OPTIMIZERS)
def test_others_optimizers_are_called_as_they_are(trained_by, model_folder, component):
    module, _, name = component.rpartition(".")
    kind = getattr(pytest.importorskip(module), name)
    options = {"optimizer": {"_component_": component, "lr": 2e-3}}
    lines, recorded = trained_by(FULL, LONG, {"optimizer": None}, options)
    model, named = oracle(model_folder, recorded, adapters=False)
    optimizer = kind(named.values(), lr=2e-3)
    if hasattr(optimizer, "train"):
        optimizer.train()
    assert_same_trajectory(lines, plain_losses(model, [optimizer], recorded, clip=1.0))


def test_an_optimizer_in_backward_learns_the_same_bits(trained_by, tmp_path):
    words, config = ["clip_grad_norm=null"], (FULL, {"max_steps": 20, "epochs": 9})
    lines, plain = trained_by(*config, words=words)
    (tmp_path / "run").rename(tmp_path / "plain")
    result = trained(tmp_path / "plain")
    path = tmp_path / "config.yaml"
    assert graphtune("train", path, "optimizer_in_backward=true") == 2, "it cannot clip"
    lines_again, again = trained_by(*config, words=[*words, "optimizer_in_backward=true"])
    assert_same_tensors(again.after[-1], plain.after[-1])
    assert_same_tensors(trained(tmp_path / "run"), result)
    for ours, theirs in zip(lines_again, lines, strict=True):
        assert ours.pop("grad_norm") == pytest.approx(theirs.pop("grad_norm"), rel=1e-5)
        assert ours == theirs


def test_the_average_of_the_weights_is_what_is_saved(trained_by, tmp_path):
    lines, recorded = trained_by(FULL, {"max_steps": 12, "epochs": 9, "ema_decay": 0.8})
    average = {name: value.clone() for name, value in recorded.start.items()}
    for after in recorded.after:
        for name, value in after.items():
            average[name] = 0.8 * average[name] + 0.2 * value
    found = trained(tmp_path / "run")
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[name], recorded.after[-1][name], atol=1e-4), name
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_deterministic_runs_have_the_same_bits(quick, tmp_path):
    config = changed(quick, {"passes": {"lora": {"dropout": 0.1}}, "deterministic": True})
    path = write_config(tmp_path / "config.yaml", config)
    try:
        for name in ("one", "two"):
            assert graphtune("train", path, f"output_dir={tmp_path / name}") == 0
    finally:
        torch.use_deterministic_algorithms(False)
    one, two = tmp_path / "one", tmp_path / "two"
    assert metrics(one) == metrics(two)
    assert_same_tensors(trained(one), trained(two))
    assert graphtune("train", path, "seed=1", f"output_dir={tmp_path / 'other'}") == 0
    torch.use_deterministic_algorithms(False)
    assert metrics(tmp_path / "other") != metrics(one)
