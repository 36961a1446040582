"""The estimate of a step's memory beside what a step takes, for six ways to train.

Each is measured in a process of its own: the most memory that the process holds during a step,
less what it holds before it, plus the tensors that are there all the time (parameters, buffers,
state of the optimizer). Steps before it have compiled, and loaded, what is loaded once. Large
blocks are given back to the system as soon as they are free, so that the difference is of live
ones. Linux alone tells the peak of a step.

    python benchmarks/memory_estimate.py --shape small
    python benchmarks/memory_estimate.py --shape smollm2-135m --batch 2 --length 256
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import graphtune as gt
from graphtune.passes import ActivationCheckpoint, Full, FusedLoss, LoRA, Pass, Quantize, optimized

SHAPES = {  # hidden, intermediate, layers, heads, heads of keys and values, vocabulary
    "small": (256, 768, 4, 4, 2, 8192),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
}
TRAINS: dict[str, Callable[[], list[Pass]]] = {
    "full": lambda: [Full()],
    "LoRA": lambda: [LoRA(rank=8)],
    "QLoRA": lambda: [Quantize("nf4"), LoRA(rank=8)],
}
SAVES: dict[str, Callable[[], list[Pass]]] = {
    "": lambda: [],
    "checkpoints, fused loss": lambda: [FusedLoss(), ActivationCheckpoint("selective")],
}
WARM_UP = 2  # steps


def make_model(shape: str) -> Any:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def resident(line: str) -> int:
    """Bytes of a line in the kernel's account of this process: `VmRSS`, or its peak, `VmHWM`."""
    status = Path("/proc/self/status").read_text()
    return next(int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith(line))


def measured(step: Callable[[], Any], kept: list[torch.Tensor]) -> int:
    """Bytes that tensors hold when a step holds the most."""
    for _ in range(WARM_UP):
        step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    step()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return resident("VmHWM") - before + sum(sizes.values())


def one(args: argparse.Namespace) -> dict[str, int]:
    """Estimate and measure, in this process."""
    torch.set_num_threads(1)
    program = gt.capture(make_model(args.shape)).apply(*TRAINS[args.trains](), *SAVES[args.saves]())
    estimate = program.memory(args.batch, args.length)
    optimizer = torch.optim.AdamW(list(program.trainable_parameters()), lr=1e-4)
    trained = optimized(program) if args.compiled else program
    step = gt.compile_step(trained, optimizer, compile=args.compiled)
    ids = torch.randint(0, 8192, (args.batch, args.length))
    mask = torch.ones(args.batch, 1, args.length, args.length, dtype=torch.bool).tril()
    positions = torch.arange(args.length).expand_as(ids).contiguous()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask, "position_ids": positions}
    step(batch)
    kept = [*program.parameters(), *program.buffers()]
    kept += [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    return {"estimate": estimate.total, "measured": measured(lambda: step(batch), kept)}


def in_own_process(args: argparse.Namespace, trains: str, saves: str, compiled: bool) -> Any:
    words = ["--shape", args.shape, "--batch", str(args.batch), "--length", str(args.length)]
    words += ["--trains", trains, "--saves", saves, *(["--compiled"] if compiled else [])]
    ended = subprocess.run(
        [sys.executable, __file__, *words],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", choices=("eager", "compiled", "both"), default="both")
    for name in ("--trains", "--saves"):  # of the one that this process measures
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trains:
        print(json.dumps(one(args)))
        return
    print(f"{args.shape}, {args.batch} x {args.length} tokens, AdamW, float32; MiB")
    print(f"{'':36}{'step':>10}{'estimate':>10}{'measured':>10}{'ratio':>8}")
    for compiled in (False, True):
        how = "compiled" if compiled else "eager"
        if args.steps not in (how, "both"):
            continue
        for trains in TRAINS:
            for saves in SAVES:
                found = in_own_process(args, trains, saves, compiled)
                mib = [found[name] / 2**20 for name in ("estimate", "measured")]
                name = f"{trains}, {saves}" if saves else trains
                print(f"{name:36}{how:>10}{mib[0]:>10.1f}{mib[1]:>10.1f}{mib[0] / mib[1]:>8.2f}")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
