"""A training run of milliseconds with all that a real one has: to be cut, killed and gone on with.

It draws from every random number generator, writes to a buffer, and has frozen parameters.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from graphtune.training.state import TrainState

MakeOptimizers = Callable[[nn.Module], Sequence[Optimizer]]


class TinyModel(nn.Module):
    """Stands in for a Program: parameters, buffers, a ledger."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.ledger = ()
        self.device = torch.device("cpu")
        self.frozen = nn.Linear(8, 64, dtype=dtype).requires_grad_(False)
        self.norm = nn.BatchNorm1d(64, dtype=dtype)  # its running mean is a buffer that changes
        self.hidden = nn.Linear(64, 64, dtype=dtype)  # large enough for torchao to quantize
        self.out = nn.Linear(64, 1, dtype=dtype)
        self.register_buffer("large", torch.zeros(2**17, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.frozen(x))
        return self.out(nn.functional.dropout(self.hidden(x).relu(), 0.1))


class TinyLoader:
    """Batches in an order of its own; goes on where it was."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.position = 0

    def next(self) -> tuple[Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(self.position)
        self.position += 1
        x = torch.randn(4, 8, generator=drawn)
        x = x + random.random() + float(np.random.rand())  # augmentation
        return x.to(self.dtype), x.sum(1, keepdim=True).sin().to(self.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)]


class TinyRun:
    """The run; `state` is what checkpoints are made of."""

    def __init__(
        self, make_optimizers: MakeOptimizers = adamw, *, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.model = TinyModel(dtype)
        self.optimizers = make_optimizers(self.model)
        self.schedules = [LambdaLR(o, lambda step: 1 / (1 + 0.1 * step)) for o in self.optimizers]
        self.loader = TinyLoader(dtype)
        self.state = TrainState(
            self.model,
            self.optimizers,
            {"optimizer": {"lr": 0.01}, "max_steps": 10},
            {"loader": self.loader}
            | {f"scheduler{i}": schedule for i, schedule in enumerate(self.schedules)},
            counters={"losses": []},
        )

    def step(self) -> None:
        x, y = self.loader.next()
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.state.step += 1
        self.state.counters["losses"].append(loss.item())

    def until(self, step: int) -> TinyRun:
        while self.state.step < step:
            self.step()
        return self

    def restored(self, folder: Path) -> TinyRun:
        self.state.restore(folder)
        return self


def assert_same_run(found: TinyRun, expected: TinyRun) -> None:
    """The same bits: weights, buffers, optimizer state, losses so far, random numbers to come."""
    ours, theirs = found.model.state_dict(), expected.model.state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    a, b = found.state.snapshot(), expected.state.snapshot()
    assert a.step == b.step
    assert a.description == b.description
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in b.tensors.items():
        assert torch.equal(a.tensors[name], tensor), name
