"""Decoding beside transformers', on the shapes of SmolLM2-135M: tokens per second, and the floor.

    python -m benchmarks.decode [--tokens 64] [--prompt 32] [--skip-compiled]

Both sides have a static cache of the same length, random weights, greedy choice, one row. The
floor is what the memory's bandwidth allows, as `graphtune generate` computes it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import graphtune as gt
from graphtune.generation import CachedDecoder, generate
from graphtune.generation.floor import bytes_per_token, read_bandwidth
from graphtune.models.families import published_config
from graphtune.passes import KVCache


def best(run: Callable[[int], object], tokens: int, repeats: int) -> float:
    """Tokens per second of decoding: what `tokens` more take than one does, the best time."""
    times = []
    for _ in range(repeats + 1):  # the first compiles
        marks = [time.perf_counter()]
        for count in (1, tokens + 1):
            run(count)
            marks.append(time.perf_counter())
        times.append((marks[2] - marks[1]) - (marks[1] - marks[0]))
    return tokens / min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--skip-compiled", action="store_true")
    options = parser.parse_args()

    config = published_config(options.model)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    length = options.prompt + options.tokens + 1
    prompt = torch.arange(options.prompt) + 100
    cache = KVCache(length, prefill=options.prompt, logits="last")
    program = gt.capture(model).apply(cache).eval()

    def theirs(compiled: bool) -> Callable[[int], object]:
        def run(count: int) -> object:
            settings = GenerationConfig(
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                eos_token_id=-1,
                pad_token_id=0,
                cache_implementation="static",
                cache_config={"max_cache_len": length},
                disable_compile=not compiled,
            )
            return model.generate(prompt[None], generation_config=settings)

        return run

    def ours(compiled: bool) -> Callable[[int], object]:
        decoder = CachedDecoder(program, compile=compiled)
        return lambda count: list(generate(decoder, [prompt.tolist()], max_new_tokens=count))

    bandwidth = read_bandwidth(torch.device("cpu"))
    floor = bandwidth / bytes_per_token(program)
    print(f"floor {floor:.1f} tokens/s ({bandwidth / 1e9:.1f} GB/s)")
    print(f"{'':10}{'ours':>10}{'of floor':>10}{'theirs':>10}{'ratio':>8}")
    for compiled in (False,) if options.skip_compiled else (False, True):
        found = [best(make(compiled), options.tokens, options.repeats) for make in (ours, theirs)]
        name = "compiled" if compiled else "eager"
        print(
            f"{name:10}{found[0]:10.1f}{found[0] / floor:10.0%}{found[1]:10.1f}"
            f"{found[0] / found[1]:8.2f}"
        )


if __name__ == "__main__":
    main()
