"""Time training steps of several contenders in turn, each in a process of its own."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


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


def _serve(step: Callable[[], float]) -> None:
    """Take a step for each line that comes in; its seconds, loss and peak memory go out."""
    import torch

    from graphtune.training.device import peak_memory

    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        peak = peak_memory(torch.device("cpu")) / 2**30
        print(json.dumps({"s": seconds, "loss": loss, "gib": peak}), flush=True)


class _Worker:
    """A contender's process, which waits while others take their step."""

    def __init__(self, command: list[str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        start = time.perf_counter()
        self.first = self.step()
        self.start_up_s = time.perf_counter() - start  # imports, model, compilation, first step
        self.step()
        self.found: list[dict[str, Any]] = []

    def step(self) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print("step", file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries print too
                return json.loads(line)
        raise SystemExit(f"{self.process.args[-1]} ended with {self.process.wait()}")


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
        contenders: in the order in which they take turns.
        reference: the contender whose step is 1.
        make_step: a contender's step on a batch, which returns the loss.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=contenders, default=contenders)
    parser.add_argument("--serve", choices=contenders, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        _serve(make_step(args.serve, random_batch(args.batch, args.length)))
        return
    workers = {}
    for contender in args.only:
        command = [sys.executable, script, "--serve", contender]
        workers[contender] = _Worker([*command, *_given(args, "batch", "length")])
    for _ in range(args.repeats):
        for worker in workers.values():
            worker.found.append(worker.step())
    _print_table(workers, reference, args.batch * args.length)
    for worker in workers.values():
        worker.process.kill()


def _given(args: argparse.Namespace, *names: str) -> list[str]:
    return [part for name in names for part in (f"--{name}", str(getattr(args, name)))]


def _print_table(workers: dict[str, _Worker], reference: str, tokens: int) -> None:
    seconds = {c: statistics.median(f["s"] for f in w.found) for c, w in workers.items()}
    unit = seconds.get(reference)
    print(f"{'':22} {'s/step':>8} {'tokens/s':>9} {'ratio':>6} {'start-up s':>11} {'GiB':>5}  loss")
    for contender, worker in workers.items():
        step, last = seconds[contender], worker.found[-1]
        ratio = f"{unit / step:6.2f}" if unit else " " * 6
        losses = f"{worker.first['loss']:.4f} → {last['loss']:.4f}"
        print(
            f"{contender:22} {step:8.3f} {tokens / step:9.0f} {ratio} {worker.start_up_s:11.1f} "
            f"{last['gib']:5.2f}  {losses}"
        )
