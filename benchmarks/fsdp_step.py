"""Training steps of the FSDP pass beside torch's `fully_shard` (FSDP2), on gloo ranks of this CPU.

    python benchmarks/fsdp_step.py [--ranks 2] [--hidden 256] [--layers 4] [--steps 7] [--compile]

Both contenders live in the same processes and take turns, step by step, on the same batch with the
same AdamW, so that a machine that others use slows both alike. Then each runs alone, for its
memory: the highest resident size of rank 0 in a step, above that before the model was made (Linux
alone tells). Prints the median time of a step, the memory, and the ratio of ours to theirs for
both. The losses must agree.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

import graphtune as gt
from graphtune.distributed import make_mesh
from graphtune.passes import FSDP

Step = Callable[[], float]


def make_model(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 32,
    )
    return AutoModelForCausalLM.from_config(config).train()


def ours(options: argparse.Namespace, ids: Tensor, mesh: DeviceMesh) -> Step:
    program = gt.capture(make_model(options)).apply(FSDP(mesh=mesh))
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=1e-3)
    step = gt.compile_step(program, optimizer, compile=options.compile)
    batch = {"input_ids": ids, "labels": ids}
    return lambda: step(batch)["loss"]


def theirs(options: argparse.Namespace, ids: Tensor, mesh: DeviceMesh) -> Step:
    model = make_model(options)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh["dp_shard"])
        if options.compile and part is not model:
            part.compile()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    tokens = ids[:, 1:].numel()  # of this rank: gradients are averaged over ranks

    def step() -> float:
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / tokens
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, float("inf"))
        assert norm.isfinite()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(total := loss.detach())
        return total.item() / dist.get_world_size()

    return step


CONTENDERS = {"graphtune": ours, "fully_shard": theirs}


def start(rank: int, file: str, options: argparse.Namespace) -> tuple[DeviceMesh, Tensor]:
    """The mesh and this rank's batch."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=options.ranks
    )
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 1024, (options.batch, options.length), generator=generator)
    return make_mesh("cpu"), ids


def time_steps(rank: int, file: str, options: argparse.Namespace) -> None:
    mesh, ids = start(rank, file, options)
    steps = {name: make(options, ids, mesh) for name, make in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.steps + 2):  # the first two compile, and make optimizer state
        for name, step in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            losses[name].append(step())
            if number >= 2:
                seconds[name].append(time.perf_counter() - begin)
    if rank == 0:
        mine, other = losses.values()
        apart = max(abs(a / b - 1) for a, b in zip(mine, other, strict=True))
        print(f"losses differ by {apart:.1e} at most (relative)")
        for name, times in seconds.items():
            print(f"{name:12} median step {statistics.median(times):.3f} s")
        pairs = zip(*seconds.values(), strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"ratio of step times {ratio:.2f} (median over pairs of steps)")
    dist.destroy_process_group()


def resident(key: str) -> int:
    """MiB that this process has (`VmRSS`), or had at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) // 1024


def measure_memory(rank: int, file: str, options: argparse.Namespace, name: str) -> None:
    mesh, ids = start(rank, file, options)
    before = resident("VmRSS")
    step = CONTENDERS[name](options, ids, mesh)
    step()
    step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    step()
    if rank == 0:
        Path(file).with_name(name).write_text(str(resident("VmHWM") - before))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, default in (
        *(("ranks", 2), ("hidden", 256), ("layers", 4)),
        *(("batch", 2), ("length", 128), ("steps", 7)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(time_steps, (f"{folder}/rendezvous", given), nprocs=given.ranks)
        memory = {}
        for name in CONTENDERS:
            mp.spawn(measure_memory, (f"{folder}/of-{name}", given, name), nprocs=given.ranks)
            memory[name] = int(Path(folder, name).read_text())
            print(f"{name:12} peak memory {memory[name]} MiB")
        mine, other = memory.values()
        print(f"ratio of peak memory {mine / other:.2f}")
