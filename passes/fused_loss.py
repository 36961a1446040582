"""FusedLoss: head and loss in chunks, so that logits of the whole batch never exist.

The gradient of a chunk's logits is computed while they are there, as in Liger Kernel (Hsu et al.,
arXiv:2410.10989), and rows without a label are dropped before the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from graphtune import exchange
from graphtune.distributed import group_name
from graphtune.errors import UserError
from graphtune.gradients import with_gradients
from graphtune.losses import (
    ROW_INPUTS,
    ContextParallelCrossEntropy,
    Loss,
    VocabParallelCrossEntropy,
    cross_entropy,
    token_cross_entropy,
    token_cross_entropy_slope,
)
from graphtune.normalize import follow_input_device
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.program import Program
from graphtune.recomputation import RECOMPUTE, tag
from graphtune.rewrite import Edit, constants_of
from graphtune.sites import Site, output_head
from graphtune.torch_private import symbolic_input, trace
from graphtune.verify import check_close, eval_output, probe_ids

aten = torch.ops.aten
KEY = "passes.fused_loss"


@dataclass(frozen=True)
class FusedLoss(Pass):
    """Makes the program return a loss: of the labelled rows alone, chunk by chunk.

    Everything after the last hidden state (head, soft-cap, scale, adapter, quantized weight) is
    cut out and applied to one chunk of labelled rows at a time. The program then takes `rows`,
    `targets` and `row_weights` besides (see `graphtune.losses.labelled_rows`), and no logits
    outlive their chunk. For logits keep the program that the pass was given; both share all
    tensors.

    Attributes:
        chunks: how many; more take less memory, and more time to compile.
        output: `loss`: the weighted sum of the rows' cross entropies, in nats, a float32 scalar.
            `log_probs`: float32 (chunks, n), the weighted log probability of each row's target,
            for objectives over whole sequences. If the head itself trains, its logits are then
            computed again in the backward pass; else never.
        label_smoothing, z_loss: as of `graphtune.losses.cross_entropy`, for `loss`.
        backward: False leaves out all gradients, for evaluation.
    """

    chunks: int = 8
    output: Literal["loss", "log_probs"] = "loss"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    backward: bool = True

    name: ClassVar[str] = "fused_loss"
    stage: ClassVar[Stage] = Stage.LOSS
    conflicts: ClassVar[frozenset[str]] = frozenset({"fused_loss"})

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise UserError(f"`{KEY}.chunks={self.chunks}` must be at least 1")
        if self.output not in ("loss", "log_probs"):
            raise UserError(f"`{KEY}.output={self.output}` must be loss or log_probs")
        if not 0 <= self.label_smoothing <= 1:
            raise UserError(f"`{KEY}.label_smoothing={self.label_smoothing}` must be from 0 to 1")
        if self.output == "log_probs" and (self.label_smoothing or self.z_loss):
            raise UserError(f"`{KEY}.output=log_probs` has no label_smoothing and no z_loss")

    @property
    def numerics(self) -> Numerics:
        return "rounded"

    @property
    def badge(self) -> str:
        return f"{self.output} in {self.chunks}"

    def __call__(self, program: Program) -> Program:
        """Apply the pass; the loss is checked against that of the program's logits."""
        if self.output == "log_probs" and _divides_tokens(program):
            raise UserError(
                f"`{KEY}.output=log_probs` is of whole rows, whose tokens "
                "`passes.context_parallel` divides"
            )
        after = super().__call__(program)
        if after.deferred is None:
            ids = probe_ids(program)
            logits = eval_output(program, ids)
            expected = self._loss(program)(logits, ids, None)
            sign = 1 if self.output == "loss" else -1
            check_close(expected * sign, eval_output(after, ids).sum(), self.name, self.numerics)
        return after

    def _loss(self, program: Program) -> Loss:
        """The loss of the logits that a program returns."""
        options = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        if _divides_tokens(program):
            return ContextParallelCrossEntropy(_group(program, "cp"), **options)
        if _returns_part_of_logits(program):
            return VocabParallelCrossEntropy(_group(program, "tp"), **options)
        return partial(cross_entropy, **options)  # type: ignore[arg-type]

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        head = _Head(edit)
        divided = None
        if head.divided:
            group = _group(edit.program, "tp")
            divided = VocabParallelCrossEntropy(group, self.label_smoothing, self.z_loss)
        added = self._add_inputs(edit)
        again = self.backward and self.output == "log_probs" and bool(head.trained)
        joined = self.backward and not again
        with edit.after(edit.graph.output_node().prev, origin=head.site.node):
            flat = edit.call(aten.flatten.using_ints, head.hidden, 0, 1)
            rows = edit.call(aten.flatten.using_ints, added[0])
            hidden = edit.call(aten.index_select.default, flat, 0, rows)
            hidden = edit.call(aten.unflatten.int, hidden, 0, [self.chunks, -1])
            chunks = [
                [edit.call(aten.select.int, one, 0, i) for one in (hidden, *added[1:])]
                for i in range(self.chunks)
            ]
            example = [node.meta["val"] for node in (*chunks[0], *head.sources)]
            body = trace(lambda *tensors: self._chunk(head, divided, joined, *tensors), example)
            results = []
            for index, chunk in enumerate(chunks):
                results.append(edit.paste(body, [*chunk, *head.sources]))
                if again:
                    for node in edit.pasted:
                        tag(node, RECOMPUTE, 1_000_000 + index)
            values, *gradients = zip(*results, strict=True)
            value = _sum(edit, values) if self.output == "loss" else _stack(edit, values)
            if joined:
                known = [_stack(edit, gradients[0]), *(_sum(edit, one) for one in gradients[1:])]
                value = edit.call(with_gradients, value, [hidden, *head.trained], known)
        edit.graph.output_node().args = (value,)
        follow_input_device(edit.graph)
        return [head.site]

    def _add_inputs(self, edit: Edit) -> list[fx.Node]:
        *_, last = edit.graph.find_nodes(op="placeholder")
        like = symbolic_input(last.meta["val"], (self.chunks, None))
        added = []
        for name, dtype in ROW_INPUTS.items():
            with edit.graph.inserting_before(last.next):
                last = edit.graph.placeholder(name)
            last.meta = {"val": like.to(dtype), "custom": {"graphtune": self.name}}
            added.append(last)
        return added

    def _chunk(
        self,
        head: _Head,
        divided: VocabParallelCrossEntropy | None,
        joined: bool,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        """What is traced: value of a chunk, and where `joined`, its gradients.

        Args:
            divided: of logits of which this rank has a part.
            hidden: (n, width).
            targets: int64 (n,).
            weights: float32 (n,).
            sources: what the head reads besides.
        """
        leaves: list[Tensor] = []
        if joined:
            hidden = hidden.detach().requires_grad_()
            given = dict(zip(head.sources, sources, strict=True))
            for node in given:
                given[node] = given[node].detach().requires_grad_(node in head.trained)
            leaves = [hidden, *(given[node] for node in head.trained)]
            sources = tuple(given.values())
        with torch.set_grad_enabled(joined):
            logits = head.run(hidden, sources)
        options = self.label_smoothing, self.z_loss
        sign = 1 if self.output == "loss" else -1
        known = logits.detach() if joined else logits
        if divided is None:
            values = token_cross_entropy(known, targets, *options)
        else:
            values, denominators = divided.of_tokens(known, targets)
        value = values * weights * sign
        if self.output == "loss":
            value = value.sum()
        if not joined:
            return (value,)
        if divided is None:
            slope = token_cross_entropy_slope(known, targets, weights * sign, *options)
        else:
            slope = divided.slope(known, targets, weights * sign, denominators)
        return value, *torch.autograd.grad(logits, leaves, slope)


def _divides_tokens(program: Program) -> bool:
    """Whether a rank has the logits of some tokens."""
    return any(row.name == "context_parallel" for row in program.ledger)


def _returns_part_of_logits(program: Program) -> bool:
    """Whether a rank has the logits of some tokens of the vocabulary."""
    rows = (dict(row.options) for row in program.ledger if row.name == "tensor_parallel")
    return any(not options["gather_logits"] for options in rows)


def _group(program: Program, axis: str) -> str:
    assert program.distribution is not None
    return group_name(program.distribution.mesh, axis)


def _sum(edit: Edit, nodes: Sequence[fx.Node]) -> fx.Node:
    total, *others = nodes
    for node in others:
        total = edit.call(aten.add.Tensor, total, node)
    return total


def _stack(edit: Edit, nodes: Sequence[fx.Node]) -> fx.Node:
    return edit.call(aten.stack.default, list(nodes))


class _Head:
    """What of a graph comes after the last hidden state.

    Attributes:
        site: the linear that makes the logits.
        hidden: its input, (batch, seq, width).
        nodes: what computes the logits from it, in order.
        sources: what those read besides: weights, and what is computed from weights alone.
        trained: those of them that get a gradient.
        divided: whether a rank computes the logits of its part of the vocabulary alone.
    """

    def __init__(self, edit: Edit) -> None:
        name = output_head(edit.graph)
        sites = [site for site in edit.sites("linear") if site.name == name]
        if not sites:
            raise UserError(f"`{KEY}`: no linear makes the logits; leave it out, `~{KEY}`")
        self.site = sites[-1]
        self.hidden = self.site.input
        self.result = edit.graph.output_node().args[0]
        gathers = self.result.target is exchange.all_gather and self.result.args[1] == 2
        self.divided = gathers or _returns_part_of_logits(edit.program)
        if gathers:  # three numbers of a token are exchanged instead of its logits
            self.result = self.result.args[0]
        after: set[fx.Node] = {self.hidden}
        for node in edit.graph.nodes:
            if node.op == "call_function" and not after.isdisjoint(node.all_input_nodes):
                after.add(node)
        before, stack = {self.result}, [self.result]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in before:
                    before.add(source)
                    stack.append(source)
        inside = (after & before) - {self.hidden}
        self.nodes = [node for node in edit.graph.nodes if node in inside]
        read = dict.fromkeys(source for node in self.nodes for source in node.all_input_nodes)
        self.sources = [node for node in read if node not in after]
        for node in self.sources:
            if constants_of(node) is None or node.target == "training":
                what = "drops at random" if node.target == "training" else f"also reads {node.name}"
                raise UserError(
                    f"`{KEY}`: what makes the logits of {name} {what}, so it cannot be applied "
                    f"to some rows alone; leave the pass out, `~{KEY}`"
                )
        self.trained = [node for node in self.sources if self._trains(edit, node)]

    @staticmethod
    def _trains(edit: Edit, node: fx.Node) -> bool:
        return any(edit.tensor(name).requires_grad for name in constants_of(node) or ())

    def run(self, hidden: Tensor, sources: Sequence[Tensor]) -> Tensor:
        """Logits (n, vocab) of hidden states (n, width)."""
        values = {self.hidden: hidden[None], **dict(zip(self.sources, sources, strict=True))}
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
        return values[self.result][0]
