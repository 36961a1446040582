"""What tests of tensor and context parallel passes run on each rank, beside one process.

Every rank also trains the whole model by itself, on the same batches, and compares.
"""

import copy
import functools
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

import graphtune as gt
from graphtune import exchange
from graphtune.distributed import group_name, make_mesh
from graphtune.losses import (
    ContextParallelCrossEntropy,
    VocabParallelCrossEntropy,
    cross_entropy,
)
from graphtune.passes import (
    FSDP,
    CausalAttention,
    ContextParallel,
    DataParallel,
    DoRA,
    FusedLoss,
    LoRA,
    Quantize,
    TensorParallel,
)
from graphtune.passes.base import Pass
from graphtune.program import Program
from tests.oracles.models import VOCAB, tiny_gpt2, tiny_model

ADAPT: dict[str, tuple[Pass, ...]] = {
    "full": (),
    "lora": (LoRA(rank=4, dtype="base"),),
    "dora": (DoRA(rank=4),),
    "qlora": (Quantize("nf4"), LoRA(rank=4)),
    "int8": (Quantize("int8"), LoRA(rank=4)),
}
LENGTH = 9


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        model: of `tests.oracles.models`, "gpt2" or "wide", whose heads are four and sizes 128.
        adapt: what trains.
        mesh: sizes of axes.
        tensor: options of TensorParallel.
        steps: of AdamW.
    """

    model: str
    adapt: str = "full"
    tensor: dict[str, Any] = field(default_factory=dict)
    mesh: dict[str, int] = field(default_factory=dict)
    steps: int = 10


def _model(name: str) -> nn.Module:
    if name == "gpt2":
        return tiny_gpt2()
    if name != "wide":
        return tiny_model(name)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).train()


@functools.cache
def captured(model: str) -> Program:
    """The program of a tiny model, the same in every process; do not train it."""
    return gt.capture(_model(model))


def adapted(case: Case) -> Program:
    """The program in one process; factors B of adapters are not at zero."""
    program = copy.deepcopy(captured(case.model))
    torch.manual_seed(1)
    program = program.apply(*ADAPT[case.adapt])
    with torch.no_grad():
        for name, parameter in program.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return program


def whole(program: Program, name: str, local: Tensor) -> Tensor:
    """A parameter or its gradient, put together from all ranks'."""
    distribution = program.distribution
    assert distribution is not None
    for part in reversed(distribution.parts.get(name, ())):
        parts = [torch.empty_like(local) for _ in range(part.ranks)]
        dist.all_gather(parts, local.contiguous(), group=distribution.mesh.get_group(part.axis))
        local = part.join(parts)
    return local


@dataclass
class Run:
    """What is compared: logits and gradients of the first step, losses, parameters at the end."""

    logits: Tensor
    losses: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def train(program: Program, steps: int, gather: Any, loss_sum: Any = cross_entropy) -> Run:
    """AdamW on `program`, the same batches whoever calls.

    Args:
        gather: of a parameter's name and a tensor of its shape, the whole.
        loss_sum: of logits and labels.
    """
    # An epsilon of the size of gradients: else rounding errors of tiny ones become whole steps.
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=1e-3, eps=1e-2)
    generator = torch.Generator().manual_seed(5)
    run = Run(torch.zeros(()), [], {}, {})
    named = {n: p for n, p in program.named_parameters() if p.requires_grad}
    for step in range(steps):
        ids = torch.randint(0, VOCAB, (2, LENGTH), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
        logits = program(ids)
        loss = loss_sum(logits, labels) / (2 * LENGTH)
        loss.backward()
        if step == 0:
            run.logits = logits.detach()
            grads = {name: p.grad for name, p in named.items() if p.grad is not None}
            run.gradients = {name: gather(name, grad) for name, grad in grads.items()}
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
    run.parameters = {name: gather(name, p.detach()).clone() for name, p in named.items()}
    return run


def difference(found: Run, expected: Run) -> dict[str, float]:
    """The largest differences; of gradients and parameters relative to each tensor's norm."""
    assert found.gradients.keys() == expected.gradients.keys()
    scale = max(float(g.norm()) for g in expected.gradients.values())

    def worst(a: dict[str, Tensor], b: dict[str, Tensor], least: float) -> float:
        return max(float((a[n] - b[n]).norm()) / max(float(b[n].norm()), least) for n in b)

    return {
        "logits": float((found.logits - expected.logits).abs().max()),
        "greedy": float((found.logits.argmax(-1) != expected.logits.argmax(-1)).sum()),
        "losses": max(
            abs(a - b) / abs(b) for a, b in zip(found.losses, expected.losses, strict=True)
        ),
        "gradients": worst(found.gradients, expected.gradients, 1e-2 * scale),
        "parameters": worst(found.parameters, expected.parameters, 1e-2),
    }


def operators(program: Program) -> Counter[str]:
    """How often each of our exchanges is in the graph."""
    names = (str(node.target) for node in program.graph.nodes)
    return Counter(name.split(".")[1] for name in names if name.startswith("graphtune."))


def compare(case: Case) -> dict[str, Any]:
    """Differences of this rank's run to one process's, and the exchanges in the graph."""
    mesh = make_mesh("cpu", **case.mesh)
    program = adapted(case)
    passes: list[Pass] = []
    if case.mesh.get("tp", 1) > 1:
        passes.append(TensorParallel(mesh=mesh, **case.tensor))
    if case.mesh.get("cp", 1) > 1:
        passes += [ContextParallel(mesh=mesh), DataParallel(mesh=mesh)]
    if case.mesh.get("dp_shard", 1) > 1:
        passes.append(FSDP(mesh=mesh))
    split = program.apply(*passes)
    alone = copy.deepcopy(program)
    found = train(split, case.steps, lambda name, local: whole(split, name, local), _loss(case))
    expected = train(alone, case.steps, lambda name, tensor: tensor)
    if case.mesh.get("cp", 1) > 1:
        group = group_name(mesh, "cp")
        found.logits = exchange.gather_balanced(found.logits, 1, LENGTH, group)
    assert split.distribution is not None
    found.losses = [float(split.distribution.sum(torch.tensor(loss))) for loss in found.losses]
    if not case.tensor.get("gather_logits", True):
        parts = torch.distributed.nn.functional.all_gather(found.logits, mesh.get_group("tp"))
        found.logits = torch.cat(parts, -1)
    return {**difference(found, expected), "operators": operators(split)}


def _loss(case: Case) -> Any:
    """The loss whose sum over the ranks is that of one process."""
    if not case.tensor.get("gather_logits", True):
        return VocabParallelCrossEntropy()
    if case.mesh.get("cp", 1) > 1:
        loss = ContextParallelCrossEntropy()
        return lambda logits, labels: loss(logits, labels) / case.mesh["cp"]
    # Ranks along dp_shard have the same tokens here, and each counts for its share.
    return lambda logits, labels: cross_entropy(logits, labels) / case.mesh.get("dp_shard", 1)


def compare_all(cases: Sequence[Case]) -> list[dict[str, Any] | str]:
    results: list[dict[str, Any] | str] = []
    for case in cases:
        try:
            results.append(compare(case))
        except Exception:
            results.append(traceback.format_exc())
    return results


def packed(ranks: int) -> float:
    """How far logits under the mask of two packed texts are from one process's."""
    mesh = make_mesh("cpu", cp=ranks, dp_shard=1)
    program = captured("llama")
    split = program.apply(ContextParallel(mesh=mesh), DataParallel(mesh=mesh))
    ids = torch.arange(2 * 13).reshape(2, 13) % VOCAB
    text = (torch.arange(13) >= 5).long()
    mask = (text[:, None] == text[None]) & torch.ones(13, 13, dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(5), torch.arange(8)]).expand(2, -1)
    with torch.no_grad():
        expected = program(ids, mask.expand(2, 1, 13, 13), positions)
        found = split(ids, mask.expand(2, 1, 13, 13), positions)
        found = exchange.gather_balanced(found, 1, 13, group_name(mesh, "cp"))
    return float((found - expected).abs().max())


def compiled(case: Case) -> float:
    """Largest relative difference of compiled to eager loss and gradients, on this rank."""
    mesh = make_mesh("cpu", **case.mesh)
    tensor = case.mesh.get("tp", 1) > 1
    divide: list[Pass] = [TensorParallel(mesh=mesh, **case.tensor)] if tensor else []
    if case.mesh.get("cp", 1) > 1:
        divide += [ContextParallel(mesh=mesh), DataParallel(mesh=mesh)]
    split = adapted(case).apply(*divide)
    optimizer = torch.optim.AdamW(split.trainable_parameters(), lr=1e-3)
    loss: Any = ContextParallelCrossEntropy() if case.mesh.get("cp", 1) > 1 else cross_entropy
    if not case.tensor.get("gather_logits", True):
        loss = VocabParallelCrossEntropy()
    step = gt.compile_step(split, optimizer, loss=loss)
    ids = torch.arange(2 * LENGTH).reshape(2, LENGTH) % VOCAB
    return step.check({"input_ids": ids, "labels": ids})


def fused(axis: str, **tensor: bool) -> dict[str, float]:
    """How far steps with FusedLoss on some tokens of packed rows are from one process's.

    Args:
        axis: tp or cp.
        tensor: options of TensorParallel.
    """
    mesh = make_mesh("cpu", dp_shard=1, **{axis: dist.get_world_size()})
    divide: list[Pass] = [ContextParallel(mesh=mesh), DataParallel(mesh=mesh)]
    if axis == "tp":
        divide = [TensorParallel(mesh=mesh, **tensor)]
    worst: dict[str, float] = {}
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    # Under sequence parallel an adapter of the head reads other tokens than the head does.
    head = () if tensor.get("sequence_parallel") else ("lm_head",)
    adapters = LoRA(rank=4, targets=("all-linear", *head))
    for name, more in (("full", ()), ("lora", (adapters,))):
        torch.manual_seed(1)
        alone = copy.deepcopy(captured("llama")).apply(*more)
        split = alone.apply(*divide)
        programs = (
            copy.deepcopy(alone),
            split.apply(FusedLoss(chunks=2, **options), CausalAttention()),
        )
        assert programs[1].takes_documents == (axis == "tp")
        if axis == "tp" and not tensor.get("sequence_parallel"):
            assert "all_gather" not in operators(programs[1])  # no logits of other ranks
        loss = functools.partial(cross_entropy, **options)
        steps = [
            gt.compile_step(
                one,
                torch.optim.AdamW(one.trainable_parameters(), lr=1e-3, eps=1e-2),
                compile=False,
                loss=loss,
            )
            for one in programs
        ]
        ids = torch.arange(2 * LENGTH).reshape(2, LENGTH) % VOCAB
        labels = ids.masked_fill(ids % 5 == 0, -100)
        labels[:, 1:3] = -100  # on one rank fewer are labelled than on the other
        batch = {"input_ids": ids, "labels": labels, "weights": 1 + ids % 3 / 2}
        batch["position_ids"] = torch.arange(LENGTH).remainder(LENGTH // 2 + 1).expand(2, -1)
        for _ in range(3):
            expected, found = (step(batch) for step in steps)
            for key in ("loss", "grad_norm"):
                difference = abs(found[key] / expected[key] - 1)
                worst[f"{name} {key}"] = max(worst.get(f"{name} {key}", 0), difference)
        expected_of, own = (dict(one.named_parameters()) for one in programs)
        with torch.no_grad():
            found_of = {name: whole(programs[1], name, own[name]) for name in expected_of}
            far = {n: (found_of[n] - p).norm() / (p.norm() + 1e-2) for n, p in expected_of.items()}
        worst[name] = max(map(float, far.values()))
    return worst
