"""How the time of a training step grows with layers, tokens, sequence length and LoRA's rank.

    python benchmarks/growth.py [--repeats 5]

Random weights in SmolLM2-135M's shape, LoRA on all linears, AdamW, float32. Each depth and rank is
a process of its own, in which the shapes of batches take turns; a graph that is compiled while
steps are timed fails the benchmark. Prints medians, a straight line through those over layers and
over tokens, and how far the points lie from it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from start_up import SMOLLM2
from steps import random_batch

DEPTHS, RANKS = (8, 16, 30), (4, 8, 16, 64)
LENGTHS = (256, 512, 1024, 2048)
ROWS = (2, 4, 6, 8)
DEPTH, RANK, BATCH = 30, 8, (4, 256)


def measure(depth: int, rank: int, shapes: list[tuple[int, int]], repeats: int) -> list[float]:
    """Median seconds of a step of each shape (rows, length)."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import graphtune as gt
    from graphtune.passes import FusedLoss, LoRA, optimized

    config = LlamaConfig(**SMOLLM2, num_hidden_layers=depth, max_position_embeddings=2048)
    program = gt.capture(AutoModelForCausalLM.from_config(config).train())
    program = optimized(program.apply(LoRA(rank=rank), FusedLoss()))
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=3e-4)
    step = gt.compile_step(program, optimizer, clip_grad_norm=1.0)
    batches = [random_batch(*shape) for shape in shapes]
    for batch in batches:
        del batch["attention_mask"]  # one text in each row
        step(batch)
    before = step.compilations
    found: list[list[float]] = [[] for _ in shapes]
    for _ in range(repeats):
        for batch, seconds in zip(batches, found, strict=True):
            start = time.perf_counter()
            step(batch)
            seconds.append(time.perf_counter() - start)
    if step.compilations != before:
        raise SystemExit(
            f"{step.compilations - before} graphs were compiled while steps were timed"
        )
    return [statistics.median(seconds) for seconds in found]


def fit(what: str, points: dict[int, float]) -> None:
    """Print a least-squares line through the points, and the largest distance from it."""
    slope, offset = statistics.linear_regression(list(points), list(points.values()))
    off = max(abs(offset + slope * x - y) / y for x, y in points.items())
    print(f"  {offset:.3f} s + {slope * 1000:.3f} ms per {what}; points lie within {off:.1%} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(**json.loads(args.one), repeats=args.repeats)))
        return

    def run(depth: int, rank: int, shapes: list[tuple[int, int]]) -> list[float]:
        one = json.dumps({"depth": depth, "rank": rank, "shapes": shapes})
        command = [sys.executable, __file__, "--one", one, "--repeats", str(args.repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    shapes = [*((rows, 256) for rows in ROWS), *((1, length) for length in LENGTHS)]
    seconds = run(DEPTH, RANK, shapes)
    tokens = {rows * 256: s for rows, s in zip(ROWS, seconds, strict=False)}
    lengths = dict(zip(LENGTHS, seconds[len(ROWS) :], strict=True))
    at_batch = tokens[BATCH[0] * BATCH[1]]
    layers = {depth: run(depth, RANK, [BATCH])[0] for depth in DEPTHS if depth != DEPTH}
    ranks = {rank: run(DEPTH, rank, [BATCH])[0] for rank in RANKS if rank != RANK}
    tables = {
        "layers, 4 x 256": {**layers, DEPTH: at_batch},
        "tokens, rows of 256": tokens,
        "length of one row": lengths,
        "rank, 4 x 256": dict(sorted({**ranks, RANK: at_batch}.items())),
    }
    for name, points in tables.items():
        print(f"{name:24}" + "".join(f"{x:>6}: {s:6.3f} s" for x, s in points.items()))
        if name.startswith(("layers", "tokens")):
            fit(name.partition(",")[0].rstrip("s"), points)


if __name__ == "__main__":
    main()
