"""What tests of distributed passes run on each rank, and in one process for comparison."""

import copy
import functools
import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from transformers import AutoModelForCausalLM, Qwen2Config

import graphtune as gt
from graphtune.distributed import make_mesh
from graphtune.inspect.memory import _Live
from graphtune.models.checkpoints import SafetensorsFiles
from graphtune.passes import FSDP, LoRA, QLoRA
from graphtune.passes.base import Pass
from graphtune.program import Program
from tests.oracles.models import VOCAB, tiny_model

ADAPT: dict[str, tuple[Pass, ...]] = {
    "full": (),
    "lora": (LoRA(rank=4),),
    "qlora": (QLoRA(rank=4),),
}
LENGTH = 9


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        model: of `tests.oracles.models`, or "uneven".
        adapt: what trains.
        distribute: the pass, without its mesh.
        mesh: sizes of axes; by default `dp_shard` has all ranks.
        more: passes besides.
    """

    model: str = "qwen2"
    adapt: str = "full"
    distribute: type[Pass] = FSDP
    options: dict[str, Any] = field(default_factory=dict)
    mesh: dict[str, int] = field(default_factory=dict)
    more: tuple[Pass, ...] = ()
    compile: bool = False
    clip: float | None = None
    steps: int = 10


@functools.cache
def captured(model: str) -> Program:
    """The program of a tiny model, the same in every process; do not train it."""
    if model != "uneven":
        return gt.capture(tiny_model(model))
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB - 1,
        hidden_size=36,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    return gt.capture(AutoModelForCausalLM.from_config(config).train())


def batches(ranks: int, steps: int) -> list[list[dict[str, Tensor]]]:
    """For each step and rank two rows, of which other shares are labelled on other ranks."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(steps):
        row = []
        for rank in range(ranks):
            ids = torch.randint(0, VOCAB - 1, (2, LENGTH), generator=generator)
            ignored = torch.rand(ids.shape, generator=generator) < 0.6 * rank / ranks
            row.append({"input_ids": ids, "labels": ids.masked_fill(ignored, -100)})
        made.append(row)
    return made


def adapted(case: Case, *passes: Pass) -> Program:
    program = captured(case.model)  # which draws numbers where it is the first time
    torch.manual_seed(1)  # adapters start at random
    return program.apply(*ADAPT[case.adapt], *case.more, *passes)


def _optimizer(program: Program) -> torch.optim.Optimizer:
    # An epsilon of the size of gradients: else rounding errors of tiny ones become whole steps.
    return torch.optim.AdamW(program.trainable_parameters(), lr=1e-2, eps=1e-3)


def train_alone(case: Case, ranks: int) -> dict[str, Any]:
    """The run in one process, the ranks' batches one after the other."""
    program = copy.deepcopy(adapted(case))
    step = gt.compile_step(
        program, _optimizer(program), compile=case.compile, clip_grad_norm=case.clip
    )
    metrics = [step(batch) for batch in batches(ranks, case.steps)]
    return {"metrics": metrics, "state": {k: v.clone() for k, v in program.state_dict().items()}}


def distributed(case: Case) -> Program:
    """The case's program on this rank."""
    mesh = make_mesh("cpu", **case.mesh)
    return adapted(case, case.distribute(mesh=mesh, **case.options))


def whole_state(program: Program) -> dict[str, Tensor]:
    """Parameters and buffers, put together by DTensor."""
    assert program.distribution is not None
    return {
        name: program.distribution.dtensor(name, tensor).full_tensor()
        for name, tensor in program.state_dict().items()
    }


def train(case: Case) -> dict[str, Any]:
    """The run on this rank; what it returns is of the whole."""
    program = distributed(case)
    step = gt.compile_step(
        program, _optimizer(program), compile=case.compile, clip_grad_norm=case.clip
    )
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    metrics = [step(row[rank]) for row in batches(ranks, case.steps)]
    return {"metrics": metrics, "state": whole_state(program)}


def train_all(cases: Sequence[Case]) -> list[dict[str, Any]]:
    return [train(case) for case in cases]


_NAMES = {
    "c10d::allgather_into_tensor_coalesced_": "gather",
    "c10d::reduce_scatter_tensor_coalesced_": "scatter",
    "c10d::allreduce_": "reduce",
}


def count_collectives(case: Case) -> list[Counter[str]]:
    """How often a forward and a backward pass call torch's process group, by the profiler."""
    program = distributed(case)
    step = gt.compile_step(program, _optimizer(program), compile=case.compile)
    (row,) = batches(torch.distributed.get_world_size(), 1)
    batch = row[torch.distributed.get_rank()]
    step.loss_sum(batch).backward()  # compiles
    counts = []
    loss = torch.zeros(())
    for half in (0, 1):
        with torch.profiler.profile() as profile:
            if half == 0:
                loss = step.loss_sum(batch)
            else:
                loss.backward()
        names = Counter(event.name for event in profile.events())
        counts.append(Counter({short: names[n] for n, short in _NAMES.items() if names[n]}))
    return counts


def order_of_operators(case: Case) -> list[str]:
    """What the compiled forward and backward pass call, one letter each: `g` starts to gather, `s`
    to scatter, `w` waits, `m` is a matrix product."""
    program = distributed(case)
    step = gt.compile_step(program, _optimizer(program), compile="whole")
    letters = {"all_gather": "g", "reduce_scatter": "s", "wait_tensor": "w", "extern_kernels": "m"}
    with fresh_cache():
        _, (forward, backward) = run_and_get_code(step, batches(1, 1)[0][0])
    return [
        "".join(
            letter for line in code.splitlines() for name, letter in letters.items() if name in line
        )
        for code in (forward, backward)
    ]


def load_shards(folder: str, passes: tuple[Pass, ...]) -> dict[str, Any]:
    """Load a checkpoint after FSDP; with the bytes of tensors that were read of its files."""
    mesh = make_mesh("cpu")
    torch.manual_seed(1)
    empty = gt.capture(gt.load_model(folder, device="meta", dtype="float32"))
    empty = empty.apply(*passes, FSDP(mesh=mesh))
    read = 0
    plain = SafetensorsFiles.read

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal read
        tensor = plain(*args, **kwargs)
        read += tensor.untyped_storage().nbytes()  # all that a view would keep
        return tensor

    with patch.object(SafetensorsFiles, "read", counted):
        loaded = gt.load_weights(empty)
    held = sum(p.numel() * p.element_size() for p in loaded.parameters())
    return {
        "read": read,
        "held": held,
        "fingerprint": loaded.info.fingerprint,
        "state": whole_state(loaded),
    }


def save_checkpoint(case: Case, folder: str) -> dict[str, Tensor]:
    """Save a program's DTensors by torch.distributed.checkpoint; returns the whole tensors."""
    program = distributed(case)
    assert program.distribution is not None
    views = {n: program.distribution.dtensor(n, t) for n, t in program.state_dict().items()}
    dcp.save(views, checkpoint_id=folder)
    return whole_state(program)


def load_checkpoint(case: Case, folder: str) -> dict[str, Tensor]:
    """Load it into the shards of a program of this world, zero before."""
    program = distributed(case)
    assert program.distribution is not None
    for tensor in program.state_dict().values():
        tensor.zero_()
    views = {n: program.distribution.dtensor(n, t) for n, t in program.state_dict().items()}
    dcp.load(views, checkpoint_id=folder)  # into the memory of the shards
    return whole_state(program)


def gradients_of(case: Case) -> dict[str, Tensor]:
    """Gradients of the loss summed over all ranks' tokens of the first step, whole."""
    program = distributed(case)
    step = gt.compile_step(program, _optimizer(program), compile=case.compile)
    (row,) = batches(torch.distributed.get_world_size(), 1)
    step.loss_sum(row[torch.distributed.get_rank()]).backward()
    assert program.distribution is not None
    return {
        name: program.distribution.dtensor(name, p.grad).full_tensor()
        for name, p in program.named_parameters()
        if p.grad is not None
    }


def wrong_loss_on_one_rank(case: Case) -> str:
    """What `check` says on each rank when one has another loss than eagerly."""
    program = distributed(case)
    step = gt.compile_step(program, _optimizer(program), compile=False)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    (row,) = batches(ranks, 1)
    eager = step.loss_sum
    assert step.check(row[rank]) == 0
    if rank == 1:  # a constant, so that gradients are right on all ranks
        step.loss_sum = lambda batch: eager(batch) + 1  # type: ignore[method-assign]
    try:
        step.check(row[rank])
    except (RuntimeError, gt.UserError) as error:
        return str(error)
    return ""


def alive_after_forward(case: Case) -> int:
    """Bytes that an uncompiled forward pass leaves for the backward pass."""
    program = distributed(case)
    step = gt.compile_step(program, _optimizer(program), compile=False)
    (row,) = batches(torch.distributed.get_world_size(), 1)
    with _Live() as live:
        loss = step.loss_sum(row[torch.distributed.get_rank()])
        gc.collect()
        alive = live.now
    loss.backward()
    return alive


def train_fully_sharded(model: str, steps: int) -> dict[str, Any]:
    """transformers' model under torch's `fully_shard`, on the same batches."""
    module = tiny_model(model)
    mesh = make_mesh("cpu")["dp_shard"]
    for part in (*module.model.layers, module):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for row in batches(ranks, steps):
        tokens = sum(int((one["labels"][:, 1:] != -100).sum()) for one in row)
        logits = module(row[rank]["input_ids"], use_cache=False).logits[:, :-1]
        labels = row[rank]["labels"][:, 1:]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (loss * ranks / tokens).backward()  # it takes the mean over ranks
        optimizer.step()
        optimizer.zero_grad()
        torch.distributed.all_reduce(total := loss.detach() / tokens)
        losses.append(float(total))
    return {
        "losses": losses,
        "state": {n: p.detach().full_tensor() for n, p in module.named_parameters()},
    }
