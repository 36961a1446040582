"""What each graph optimization saves of a training step, at SmolLM2-135M's layer shapes.

    python benchmarks/graph_passes.py [--layers 2] [--batch 4] [--length 256] [--repeats 15]
                                      [--rank 8] [--threads 1]

All variants live in one process and take turns; time is the process's CPU time. Prints the median
of each with its quartiles, the ratio to the program without optimizations (the median of the ratios
in the same turn, with quartiles), inductor's kernels and the compiled step's loss and gradients
beside those of the first. The vocabulary is small, so that the layers are what is measured; weights
are random. `--rank 0` trains all weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import graphtune as gt
from graphtune.engine import TrainStep
from graphtune.passes import CausalAttention, Full, FuseAdapters, GroupedAttention, LoRA

VOCAB = 512
# Which passes, and whether the batch has a mask.
VARIANTS: dict[str, tuple[tuple, bool]] = {
    "none": ((), True),
    "fuse_adapters": ((FuseAdapters(),), True),
    "grouped_attention": ((GroupedAttention(),), True),
    "causal_attention, no mask": ((CausalAttention(),), False),
    "all, mask": ((FuseAdapters(), GroupedAttention(), CausalAttention()), True),
    "all, no mask": ((FuseAdapters(), GroupedAttention(), CausalAttention()), False),
}


def tuned(layers: int, rank: int) -> gt.Program:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    program = gt.capture(AutoModelForCausalLM.from_config(config))
    program = program.apply(LoRA(rank=rank, alpha=2 * rank) if rank else Full())
    with torch.no_grad():
        for name, parameter in program.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    return program


def gradients(step: TrainStep, batch: dict) -> Callable[[], tuple]:
    def run() -> tuple:
        loss = step.loss_sum(batch)
        return loss.detach(), torch.autograd.grad(loss, step.parameters)

    return run


def kernels(run: Callable[[], tuple]) -> int:
    """Compile, and count the kernels that inductor writes; a cached step has none."""
    from torch._inductor import config, metrics

    metrics.reset()
    with config.patch(force_disable_caches=True):
        run()
    return metrics.generated_kernel_count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 2),
        ("batch", 4),
        ("length", 256),
        ("repeats", 15),
        ("rank", 8),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    program = tuned(args.layers, args.rank)
    ids = torch.randint(0, VOCAB, (args.batch, args.length))
    batch = {"input_ids": ids, "labels": ids}
    mask = torch.ones(args.batch, 1, args.length, args.length, dtype=torch.bool).tril()
    runs, counts, results = {}, {}, {}
    for name, (passes, masked) in VARIANTS.items():
        variant = program.apply(*passes)
        optimizer = torch.optim.SGD(variant.trainable_parameters(), lr=0.0)
        step = gt.compile_step(variant, optimizer)
        runs[name] = gradients(step, batch | ({"attention_mask": mask} if masked else {}))
        counts[name] = kernels(runs[name])
        results[name] = runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.repeats):
        for name in runs if turn % 2 else reversed(runs):
            start = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - start)
    print(f"{'':28} {'ms/step':>8} {'quartiles':>15} {'ratio':>6} {'quartiles':>13} kernels")
    loss, gradient = results["none"]
    for name, found in seconds.items():
        low, middle, high = (1e3 * q for q in statistics.quantiles(found, n=4))
        ratios = [a / b for a, b in zip(seconds["none"], found, strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        own_loss, own = results[name]
        off = max(float((a - b).norm() / a.norm()) for a, b in zip(gradient, own, strict=True))
        print(
            f"{name:28} {middle:8.1f} {low:7.1f}-{high:7.1f} {quarters[1]:6.3f} "
            f"{quarters[0]:.3f}-{quarters[2]:.3f} {counts[name]:7}   "
            f"loss off by {abs(float(own_loss / loss) - 1):.1e}, gradients by {off:.1e}"
        )


if __name__ == "__main__":
    main()
