"""From a Program and a loss to a compiled training step."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from graphtune.allocator import allocator_name
from graphtune.compilation import WAYS, Compile, Compiled
from graphtune.cpu_matmul import prefers_onednn
from graphtune.errors import UserError
from graphtune.fake_quantization import rounds_inputs
from graphtune.image_inputs import as_taken
from graphtune.losses import (
    Batch,
    Loss,
    cross_entropy,
    excerpt,
    labelled_tokens,
    loss_sum,
)
from graphtune.program import Program
from graphtune.recomputation import as_tagged, by_region
from graphtune.torch_private import salted_cache
from graphtune.training.optimizers import MuonWithAdamW, OptimizerInBackward
from graphtune.training.ranks import raise_together
from graphtune.transient import recompute_in_backward
from graphtune.verify import nudged


class NotFinite(RuntimeError):
    """A loss or a gradient is infinite or not a number; no parameter has become so."""


def plan_hash(program: Program) -> str:
    """Hash of the passes and options that made a program, and of graphtune's version.

    It salts torch's compile caches, which ignore metadata that passes set on nodes, and what our
    operators are made of.
    """
    plan = [version("graphtune"), *((row.name, dict(row.options)) for row in program.ledger)]
    return hashlib.sha256(json.dumps(plan, default=str, sort_keys=True).encode()).hexdigest()[:16]


def save_batches(batches: Sequence[Batch], path: Path) -> None:
    """Save batches as safetensors, `name` of batch i as `i.name`, such as those of a bad step."""
    save_file(
        {f"{i}.{k}": t.contiguous() for i, b in enumerate(batches) for k, t in b.items()}, path
    )


class TrainStep:
    """One optimizer step on one batch, or on several micro-batches that count as one.

    Made by `compile_step`. `loss_sum` is the part that is compiled: program and loss.

    Attributes:
        compilations: how many graphs were compiled so far, see `graphtune.compilation`.
    """

    def __init__(
        self,
        program: Program,
        optimizer: torch.optim.Optimizer,
        *,
        compile: Compile = True,
        clip_grad_norm: float | None = None,
        loss: Loss = cross_entropy,
    ) -> None:
        self.program = program
        self.optimizer = optimizer
        self.loss = loss
        self.clip_grad_norm = clip_grad_norm
        self.parameters = list(program.trainable_parameters())
        self._updates_in_backward = isinstance(optimizer, OptimizerInBackward)
        self._tag = plan_hash(program)
        self._drops = any(n.target == "training" for n in program.graph.find_nodes(op="get_attr"))
        self._uncompiled = by_region(program)
        self._compiled = Compiled(program, loss, compile) if compile else None

    @property
    def compilations(self) -> int:
        return 0 if self._compiled is None else self._compiled.graphs

    def __str__(self) -> str:
        """How steps are run, for people."""
        dtypes = {str(p.dtype).removeprefix("torch.") for p in self.parameters}
        where = self.program.device.type
        if where == "cpu":
            where += f", {torch.get_num_threads()} threads, {allocator_name()} allocator"
            where += ", products by oneDNN" if self._compiled and prefers_onednn() else ""
        return f"{', '.join(sorted(dtypes))} on {where}, {self._compiled or 'not compiled'}"

    def _plain_loss_sum(self, batch: Batch) -> Tensor:
        with recompute_in_backward():  # what the compiler does by the graph's tags
            return loss_sum(self._uncompiled, as_taken(self.program, batch), self.loss)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Loss summed over the batch's labelled tokens, differentiable."""
        if self._compiled is None:
            return self._plain_loss_sum(batch)
        batch = as_taken(self.program, batch)
        with salted_cache(self._tag), as_tagged(self.program):
            return self._compiled(batch)

    def __call__(
        self, batch: Batch | Sequence[Batch], *, loss_limit: float = math.inf
    ) -> dict[str, float]:
        """Forward, backward and an optimizer step.

        Args:
            batch: `input_ids` and `labels` int64 (batch, seq), optional `attention_mask` bool
                (batch, 1, seq, seq) or (batch, seq), optional `position_ids` int64 (batch, seq),
                which without a mask tell where documents begin (`graphtune.masks.find_documents`),
                optional `weights` float32 (batch, seq) of the labels, optional images (see
                `graphtune.image_inputs.with_images`); or several such, whose
                gradients are added up. The loss is the (weighted) mean over all labelled tokens
                of all of them, as if they were one batch.
            loss_limit: a step whose loss is above it is left out: the optimizer does not step.

        Returns:
            `loss` in nats per token; `tokens`, how many were labelled; `grad_norm`, the gradient's
            2-norm before clipping; `skipped`, 1, if the step was left out (an optimizer in
            backward then has no gradient, and its norm is 0).

        Raises:
            UserError: no token is labelled.
            NotFinite: the loss or the gradient is; no parameter was changed. (Of an optimizer in
                backward, those were whose gradients came first, and were finite.)
        """
        micro_batches = [batch] if isinstance(batch, Mapping) else list(batch)
        tokens = int(self._over_ranks(sum(labelled_tokens(one["labels"]) for one in micro_batches)))
        if tokens == 0:
            raise UserError("batch: no token has a label; nothing can be learned from it")
        weight: float = tokens
        if any("weights" in one for one in micro_batches):
            parts = (labelled_tokens(one["labels"], one.get("weights")) for one in micro_batches)
            weight = float(self._over_ranks(sum(parts)))
        if weight == 0:
            raise UserError("batch: every label has the weight 0; nothing can be learned from it")
        loss = torch.zeros((), device=self.program.device)
        for one in micro_batches:
            part = self.loss_sum(one) / weight
            loss += self._over_ranks(part.detach())
            if self._updates_in_backward and not loss.item() <= min(loss_limit, sys.float_info.max):
                break  # afterwards it would be too late
            part.backward()
        grad_norm = float(self._clip())
        metrics = {"loss": loss.item(), "tokens": tokens, "grad_norm": grad_norm}
        if not math.isfinite(metrics["loss"] + grad_norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise NotFinite(f"the loss is {metrics['loss']}, the gradient's norm {grad_norm}")
        if metrics["loss"] > loss_limit:
            metrics["skipped"] = 1
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def _over_ranks(self, value: Any) -> Any:
        """The sum over the ranks of a run, which see different tokens."""
        distribution = self.program.distribution
        if distribution is None:
            return value
        return distribution.sum(torch.as_tensor(value, device=self.program.device))

    def _clip(self) -> Tensor:
        """Norm of the whole gradient, which is then no longer than it may be."""
        limit = float("inf") if self.clip_grad_norm is None else self.clip_grad_norm
        distribution = self.program.distribution
        if distribution is None:
            if isinstance(self.optimizer, OptimizerInBackward):
                return self.optimizer.grad_norm()
            return torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        norms = {}
        for name, parameter in self.program.named_parameters():
            if isinstance(self.optimizer, OptimizerInBackward):
                norms[name] = self.optimizer.norms.get(parameter, torch.zeros(()))
            elif parameter.grad is not None:
                norms[name] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        norm = distribution.norm(norms)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    def check(self, batch: Batch, tolerance: float | None = None) -> float:
        """Compare compiled loss and gradients with eager ones on one batch.

        A compiler that is wrong is usually wrong by far, and silently; this is the gate before
        the first step. Dropout is off while it runs.

        Args:
            batch: as for a step; two of its rows are looked at, where the most labels are.
            tolerance: largest relative difference, in the 2-norm of each gradient, allowed; None
                for 1e-3. Where inputs are fake-quantized, sums in another order round some of them
                to the next integer, in one layer after the other; there the gradient is compared
                as a whole, and None allows 0.1, or twice what a change of the norms' weights in
                their last bits makes.

        Returns:
            The largest relative difference found.

        Raises:
            RuntimeError: naming the parameter and the difference.
            UserError: on another rank they differ; all ranks of a run must call, and all raise.
        """
        rounds = rounds_inputs(self.program.graph)
        batch = excerpt(batch)
        was_training = self.program.training
        if self._drops:  # else the mode is all the same, and a change of it compiles once more
            self.program.eval()
        try:
            expected_loss, expected = self._gradients(self._plain_loss_sum, batch)
            if tolerance is None and rounds:
                with nudged(self.program):
                    _, moved = self._gradients(self._plain_loss_sum, batch)
                tolerance = max(0.1, 2 * _apart(expected, moved))
            loss, found = self._gradients(self.loss_sum, batch)
        finally:
            self.program.train(was_training)
        tolerance = 1e-3 if tolerance is None else tolerance
        scale = max(float(g.norm()) for g in expected)
        worst, where = abs(float(loss / expected_loss) - 1), "the loss"
        names = [name for name, p in self.program.named_parameters() if p.requires_grad]
        if rounds:
            worst, where = max((worst, where), (_apart(expected, found), "all parameters together"))
            names, expected, found = [], (), ()
        for name, e, f in zip(names, expected, found, strict=True):
            difference = float((e - f).norm()) / max(float(e.norm()), 1e-3 * scale)
            worst, where = max((worst, where), (difference, name))
        failure = None
        if not worst <= tolerance:
            failure = RuntimeError(
                f"compiled and eager gradients differ by {worst:.2g} (relative) at {where}, more "
                f"than {tolerance:.0e}; train with compile=false and report this"
            )
        if self.program.distribution is not None:
            raise_together(failure)
        elif failure is not None:
            raise failure
        return worst

    def _gradients(self, loss_sum: Any, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = loss_sum(batch)
        return loss.detach(), torch.autograd.grad(loss, self.parameters)


def _apart(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Relative difference of two gradients as wholes, in the 2-norm."""
    differences = (float((e - f).norm()) for e, f in zip(expected, found, strict=True))
    length = math.hypot(*(float(e.norm()) for e in expected))  # of a rank's part, perhaps 0
    return math.hypot(*differences) / max(length, sys.float_info.min)


def compile_step(
    program: Program,
    optimizer: torch.optim.Optimizer,
    *,
    compile: Compile = True,
    clip_grad_norm: float | None = None,
    loss: Loss = cross_entropy,
) -> TrainStep:
    """A training step, compiled by `torch.compile` at its first call.

    Args:
        program: with at least one trainable parameter.
        optimizer: over `program.trainable_parameters()`.
        compile: `whole` or `layers` (each distinct layer once, which starts sooner), or True or
            `auto`, which choose; False runs the same graph operator by operator, for debugging.
        clip_grad_norm: largest 2-norm of the gradient; None does not clip.
        loss: of logits (batch, seq, vocab), labels (batch, seq) and their weights or None, summed
            over all labelled tokens; `functools.partial(cross_entropy, z_loss=1e-4)` adds to it.

    Returns:
        `step(batch) -> {"loss", "tokens", "grad_norm"}`; see `TrainStep`.

    Raises:
        UserError: nothing in the program trains; `compile` is none of these, or `layers` of a
            model without; or the optimizer steps in the backward pass, and its gradients are to
            be clipped; or it needs whole matrices, and a rank has parts.
    """
    if not any(True for _ in program.trainable_parameters()):
        raise UserError("compile_step: the program has no trainable parameter; apply a pass first")
    if compile not in WAYS:
        raise UserError(f"`compile={compile}` must be auto, whole, layers, true or false")
    passes = {row.name for row in program.ledger}
    if "context_parallel" in passes and not passes & {"fsdp", "data_parallel"}:
        raise UserError(
            "compile_step: `passes.context_parallel` leaves each rank the gradient of its tokens; "
            "add `passes.fsdp` or `passes.data_parallel`, which sum them"
        )
    if clip_grad_norm is not None and isinstance(optimizer, OptimizerInBackward):
        raise UserError(
            f"`clip_grad_norm={clip_grad_norm}` needs all gradients before the first update, and "
            "an optimizer in backward has updated by then; set `clip_grad_norm=null`"
        )
    divided = program.distribution is not None and program.distribution.parts
    if divided and isinstance(optimizer, MuonWithAdamW | torch.optim.Muon):
        raise UserError(
            "`optimizer`: Muon needs whole matrices, and FSDP gives a rank rows; take AdamW"
        )
    return TrainStep(program, optimizer, compile=compile, clip_grad_norm=clip_grad_norm, loss=loss)
