"""The training step: accumulation, clipping, compiled against eager, and its own gate."""

import pytest
import torch

import graphtune as gt
from graphtune.passes import LoRA
from tests.oracles.models import random_ids, tiny_model


def tuned(seed=0, **options):
    torch.manual_seed(seed)
    return gt.capture(tiny_model("llama")).apply(LoRA(rank=2, **options))


def batch(rows, length, seed):
    ids = random_ids(rows, length, seed)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "labels": labels}


def make_step(program, **options):
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=1e-2)
    return gt.compile_step(program, optimizer, **options)


def weights(program):
    return torch.cat([p.detach().flatten() for p in program.trainable_parameters()])


def test_loss_is_transformers():
    model = tiny_model("llama")
    data = batch(3, 12, 0)
    step = make_step(gt.capture(model).apply(LoRA()), compile=False)
    expected = model(**data, use_cache=False).loss.item()
    result = step(data)
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert result["tokens"] == 3 * 6


def test_accumulation_equals_one_large_batch():
    whole = batch(4, 12, 0)
    whole["labels"][1, :11] = -100  # uneven, so that a mean of means would show
    parts = [{k: v[:1] for k, v in whole.items()}, {k: v[1:] for k, v in whole.items()}]
    one, many = tuned(), tuned()
    first, second = make_step(one, compile=False)(whole), make_step(many, compile=False)(parts)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
    torch.testing.assert_close(weights(many), weights(one), atol=1e-6, rtol=1e-5)


def test_clipping_bounds_the_step_and_reports_the_whole_norm():
    program = tuned()
    optimizer = torch.optim.SGD(program.trainable_parameters(), lr=1.0)
    before = weights(program)
    result = gt.compile_step(program, optimizer, compile=False, clip_grad_norm=1e-3)(batch(2, 8, 1))
    assert result["grad_norm"] > 1e-3
    assert (weights(program) - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_compiled_losses_are_eager_ones():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = tuned(), tuned()
    eager_step, compiled_step = make_step(eager, compile=False), make_step(compiled, compile=True)
    assert compiled_step.check(batch(2, 8, 0)) < 1e-3
    for seed in range(6):
        data = batch(2, 8, seed)
        assert compiled_step(data)["loss"] == pytest.approx(eager_step(data)["loss"], abs=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "recompiled"


def test_the_gate_catches_a_wrong_compiler(monkeypatch):
    step = make_step(tuned(), compile=False)
    right = step._plain_loss_sum
    monkeypatch.setattr(step, "loss_sum", lambda data: right(data) * 1.01)
    with pytest.raises(RuntimeError, match="compile=false"):
        step.check(batch(2, 8, 0))


def test_a_batch_without_labels_is_refused():
    data = batch(2, 8, 0)
    data["labels"].fill_(-100)
    with pytest.raises(gt.UserError, match="label"):
        make_step(tuned(), compile=False)(data)


def test_a_program_that_cannot_train_is_refused():
    program = gt.capture(tiny_model("llama"))
    program.requires_grad_(False)
    with pytest.raises(gt.UserError, match="no trainable parameter"):
        gt.compile_step(program, torch.optim.SGD([torch.zeros(1)]))


def test_plan_hash_depends_on_passes_and_options():
    from graphtune.engine import plan_hash

    assert plan_hash(tuned()) == plan_hash(tuned())
    assert plan_hash(tuned()) != plan_hash(tuned(alpha=3))
