"""Time training steps of several contenders, each in a process of its own, one after the other."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence


def random_batch(size: int, length: int) -> dict:
    """A batch without padding, with the mask and the positions that a Program takes."""
    import torch

    ids = torch.randint(0, 49000, (size, length), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": torch.ones(size, 1, length, length, dtype=torch.bool).tril(),
        "position_ids": torch.arange(length).expand(size, -1).contiguous(),
    }


def measure(step: Callable[[], float], steps: int) -> dict:
    """Seconds of the first step, and the median of `steps` others."""
    import torch

    from graphtune.training.device import peak_memory

    start = time.perf_counter()
    losses = [step()]
    first = time.perf_counter() - start
    step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    return {
        "step_s": statistics.median(seconds),
        "first_step_s": first,
        "peak_gib": peak_memory(torch.device("cpu")) / 2**30,
        "losses": [losses[0], losses[-1]],
    }


def compare(
    script: str,
    doc: str,
    contenders: Sequence[str],
    reference: str,
    make_step: Callable[[str, dict], Callable[[], float]],
) -> None:
    """The command line of a benchmark: a table, with ratios to the reference's step.

    Args:
        script: the benchmark's file, which is run again for each contender.
        doc: its docstring.
        contenders: in the order in which they run.
        reference: the contender whose step is 1.
        make_step: a contender's step on a batch, which returns the loss.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--contender", choices=contenders, help="run this one only, print JSON")
    args = parser.parse_args()
    if args.contender:
        step = make_step(args.contender, random_batch(args.batch, args.length))
        print(json.dumps(measure(step, args.steps)))
        return
    results = {}
    for contender in contenders:
        command = [sys.executable, script, "--contender", contender]
        for name in ("batch", "length", "steps"):
            command += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[contender] = json.loads(done.stdout.splitlines()[-1])
    unit = results[reference]["step_s"]
    print(f"{'':22} {'s/step':>8} {'tokens/s':>9} {'ratio':>6} {'first step s':>13} {'GiB':>5}")
    for contender, result in results.items():
        print(
            f"{contender:22} {result['step_s']:8.2f} "
            f"{args.batch * args.length / result['step_s']:9.0f} "
            f"{unit / result['step_s']:6.2f} {result['first_step_s']:13.1f} "
            f"{result['peak_gib']:5.2f}   loss {' → '.join(f'{x:.4f}' for x in result['losses'])}"
        )
