"""Time to the first step against depth: compiled whole, and each distinct layer once.

    python benchmarks/start_up.py [--depths 4 8 16 30] [--ways layers whole] [--width real]

The model has SmolLM2-135M's shape (`--width real`), or an eighth of its width (`small`), with
random weights and LoRA on all linears (`--full`: all parameters train). Each line is two fresh
processes: the first finds empty caches, the second what the first left in them. Time runs from
the start of Python to the end of the first optimizer step, captured graph, gradient check and
optimizer included. CPU seconds (user time of the process and of the compilers that it started)
depend less on what else the machine does. `graphs` is how many were compiled before the first
step was done; two batches of other shapes follow, which must compile none, or the benchmark fails.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SMALL = {**SMOLLM2, "vocab_size": 6144, "hidden_size": 72, "intermediate_size": 192}


def cpu_seconds() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime for usage in used)


def run(depth: int, how: str, width: str, full: bool, rows: int, length: int) -> dict:
    """Start as a training run does, and take a step."""
    import torch
    from transformers import LlamaConfig

    import graphtune as gt
    from graphtune.models.empty import empty_model, move_buffers_aside
    from graphtune.passes import Full, LoRA
    from graphtune.weights import fill

    config = LlamaConfig(**(SMOLLM2 if width == "real" else SMALL), num_hidden_layers=depth)
    model = empty_model(config, torch.float32).train()
    model.graphtune_buffers = move_buffers_aside(model)
    program = gt.capture(model)
    captured = cpu_seconds()
    program = program.apply(Full() if full else LoRA(rank=8))
    generator = torch.Generator().manual_seed(0)
    weights = (
        (name, torch.empty(like.shape).normal_(0, 0.02, generator=generator))
        for name, like in program.deferred.checkpoint.items()
    )
    program = fill(program, weights, torch.device("cpu"))
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=1e-5)
    step = gt.compile_step(program, optimizer, compile=how)

    def batch(rows: int, length: int) -> dict:
        ids = torch.randint(0, config.vocab_size, (rows, length), generator=generator)
        return {"input_ids": ids, "labels": ids}

    difference = step.check(batch(rows, length))
    step(batch(rows, length))
    result = {
        "cpu": cpu_seconds(),
        "captured": captured,
        "wall": time.time() - START,
        "graphs": step.compilations,
        "difference": difference,
    }
    for other in ((rows, length + 16), (rows + 1, length)):
        step(batch(*other))
    if step.compilations != result["graphs"]:
        sys.exit(f"{how}, {depth} layers: batches of other shapes were compiled anew")
    return result


def fresh(arguments: list[str], caches: str) -> dict:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "inductor"),
        "GRAPHTUNE_CACHE": os.path.join(caches, "graphtune"),
    }
    command = [sys.executable, __file__, "--started", str(time.time()), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 30])
    parser.add_argument("--ways", nargs="+", default=["layers", "whole"])
    parser.add_argument("--width", choices=("real", "small"), default="real")
    parser.add_argument("--full", action="store_true", help="train all parameters, without LoRA")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--started", type=float, help="run one here, print JSON")
    args = parser.parse_args()
    if args.started:
        global START
        START = args.started
        shape = args.width, args.full, args.rows, args.length
        print(json.dumps(run(args.depths[0], args.ways[0], *shape)))
        return
    print(f"{'':16} {'graphs':>6}   cold: {'s':>6} {'CPU s':>6}   warm: {'s':>6} {'CPU s':>6}")
    for how in args.ways:
        for depth in args.depths:
            options = ["--depths", str(depth), "--ways", how, "--width", args.width]
            options += ["--rows", str(args.rows), "--length", str(args.length)]
            options += ["--full"] if args.full else []
            with tempfile.TemporaryDirectory(prefix="graphtune-start-up-") as caches:
                cold, warm = fresh(options, caches), fresh(options, caches)
            print(
                f"{how:6} {depth:2} layers {cold['graphs']:6}   "
                f"      {cold['wall']:6.1f} {cold['cpu']:6.1f}         "
                f"{warm['wall']:6.1f} {warm['cpu']:6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
