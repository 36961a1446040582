"""From a Program and a loss to a compiled training step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from graphtune.errors import UserError
from graphtune.losses import cross_entropy, labelled_tokens
from graphtune.program import Program
from graphtune.quantization import recompute_in_backward
from graphtune.torch_private import salted_cache

Batch = Mapping[str, Tensor]


def plan_hash(program: Program) -> str:
    """Hash of the passes and options that made a program, and of graphtune's version.

    It salts torch's compile caches, which ignore metadata that passes set on nodes, and what our
    operators are made of.
    """
    plan = [version("graphtune"), *((row.name, dict(row.options)) for row in program.ledger)]
    return hashlib.sha256(json.dumps(plan, default=str, sort_keys=True).encode()).hexdigest()[:16]


class TrainStep:
    """One optimizer step on one batch, or on several micro-batches that count as one.

    Made by `compile_step`. `loss_sum` is the part that is compiled: program and loss.
    """

    def __init__(
        self,
        program: Program,
        optimizer: torch.optim.Optimizer,
        *,
        compile: bool = True,
        clip_grad_norm: float | None = None,
    ) -> None:
        self.program = program
        self.optimizer = optimizer
        self.clip_grad_norm = clip_grad_norm
        self.parameters = list(program.trainable_parameters())
        self._tag = plan_hash(program)
        self._compiled = torch.compile(self._eager_loss_sum, fullgraph=True) if compile else None

    def _eager_loss_sum(self, batch: Batch) -> Tensor:
        logits = self.program(
            batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
        )
        return cross_entropy(logits, batch["labels"])

    def _plain_loss_sum(self, batch: Batch) -> Tensor:
        with recompute_in_backward():  # what the compiler does by the graph's tags
            return self._eager_loss_sum(batch)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Loss summed over the batch's labelled tokens, differentiable."""
        if self._compiled is None:
            return self._plain_loss_sum(batch)
        with salted_cache(self._tag):
            return self._compiled(batch)

    def __call__(self, batch: Batch | Sequence[Batch]) -> dict[str, float]:
        """Forward, backward and an optimizer step.

        Args:
            batch: `input_ids` and `labels` int64 (batch, seq), optional `attention_mask` bool
                (batch, 1, seq, seq) or (batch, seq), optional `position_ids` int64 (batch, seq);
                or several such, whose gradients are added up. The loss is the mean over all
                labelled tokens of all of them, as if they were one batch.

        Returns:
            `loss` in nats per token; `tokens`, how many were labelled; `grad_norm`, the gradient's
            2-norm before clipping.

        Raises:
            UserError: no token is labelled.
        """
        micro_batches = [batch] if isinstance(batch, Mapping) else list(batch)
        tokens = int(sum(labelled_tokens(one["labels"]) for one in micro_batches))
        if tokens == 0:
            raise UserError("batch: no token has a label; nothing can be learned from it")
        loss = torch.zeros((), device=self.parameters[0].device)
        for one in micro_batches:
            part = self.loss_sum(one) / tokens
            part.backward()
            loss += part.detach()
        limit = float("inf") if self.clip_grad_norm is None else self.clip_grad_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "tokens": tokens, "grad_norm": float(grad_norm)}

    def check(self, batch: Batch, tolerance: float = 1e-3) -> float:
        """Compare compiled loss and gradients with eager ones on one batch.

        A compiler that is wrong is usually wrong by far, and silently; this is the gate before
        the first step. Dropout is off while it runs.

        Args:
            batch: as for a step.
            tolerance: largest relative difference, in the 2-norm of each gradient, allowed.

        Returns:
            The largest relative difference found.

        Raises:
            RuntimeError: naming the parameter and the difference.
        """
        was_training = self.program.training
        self.program.eval()
        try:
            expected_loss, expected = self._gradients(self._plain_loss_sum, batch)
            loss, found = self._gradients(self.loss_sum, batch)
        finally:
            self.program.train(was_training)
        scale = max(float(g.norm()) for g in expected)
        worst, where = abs(float(loss / expected_loss) - 1), "the loss"
        names = [name for name, p in self.program.named_parameters() if p.requires_grad]
        for name, e, f in zip(names, expected, found, strict=True):
            difference = float((e - f).norm()) / max(float(e.norm()), 1e-3 * scale)
            worst, where = max((worst, where), (difference, name))
        if not worst <= tolerance:
            raise RuntimeError(
                f"compiled and eager gradients differ by {worst:.2g} (relative) at {where}, more "
                f"than {tolerance:.0e}; train with compile=false and report this"
            )
        return worst

    def _gradients(self, loss_sum: Any, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = loss_sum(batch)
        return loss.detach(), torch.autograd.grad(loss, self.parameters)


def compile_step(
    program: Program,
    optimizer: torch.optim.Optimizer,
    *,
    compile: bool = True,
    clip_grad_norm: float | None = None,
) -> TrainStep:
    """A training step, compiled by `torch.compile` at its first call.

    Args:
        program: with at least one trainable parameter.
        optimizer: over `program.trainable_parameters()`.
        compile: False runs the same graph operator by operator, for debugging.
        clip_grad_norm: largest 2-norm of the gradient; None does not clip.

    Returns:
        `step(batch) -> {"loss", "tokens", "grad_norm"}`; see `TrainStep`.

    Raises:
        UserError: nothing in the program trains.
    """
    if not any(True for _ in program.trainable_parameters()):
        raise UserError("compile_step: the program has no trainable parameter; apply a pass first")
    return TrainStep(program, optimizer, compile=compile, clip_grad_norm=clip_grad_norm)
