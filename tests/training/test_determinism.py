"""Equal runs give equal bits."""

import os
import random

import numpy as np
import pytest
import torch

import graphtune as gt
from graphtune.passes import LoRA
from graphtune.training.determinism import seed_everything
from tests.oracles.models import assert_same_tensors, random_ids, tiny_model


@pytest.fixture(autouse=True)
def restore(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def run(seed):
    model = tiny_model("llama")
    seed_everything(seed, deterministic=True)
    program = gt.capture(model).apply(LoRA(rank=2, dropout=0.3))
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=1e-2)
    step = gt.compile_step(program, optimizer, compile=False)
    losses = []
    for number in range(5):
        ids = random_ids(2, 10, number)
        losses.append(step({"input_ids": ids, "labels": ids})["loss"])
    return losses, {name: p.detach() for name, p in program.named_parameters()}


def test_equal_runs_give_equal_bits_and_others_do_not():
    (losses, weights), (again, weights_again), (other, _) = run(3), run(3), run(4)
    assert losses == again
    assert losses != other
    assert_same_tensors(weights_again, weights)


def test_every_generator_is_seeded():
    def draw():
        seed_everything(5)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_deterministic_mode_is_an_error_where_there_is_no_such_algorithm():
    seed_everything(5, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
