"""Batches of graphtune's loader beside TRL's packing and collation, on the same examples.

    python benchmarks/data_loader.py [--examples 20000] [--length 2048] [--batch 8]

Each contender runs alone, in a process of its own, after the others are done. All begin with the
tokenised examples in an Arrow table, and shuffle. Prints non-padding tokens/s over one epoch, the
ratio to TRL in the same mode with as many workers, the share of the batches that is not padding,
and the time to the first batch, packing included.

Lengths are log-normal, as those of instruction data tend to be: half of the examples have less
than 200 tokens, one in a hundred has more than 2000 and is cut to `--length`.

What batches hold differs. TRL's packed ones say where documents begin, for flash attention; its
padded ones are as long as their longest example. graphtune's have one shape in all of the epoch,
and an attention mask, (batch, 1, length, length), for any model. Making that takes most of the
time, so it is made on the device that trains: `graphtune, no mask` is all that is left to do for
a GPU's host, and what compares with TRL; `graphtune` is what training on a CPU gets.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

MODES = ("packed", "padded")
WORKERS = (0, 2)
LIBRARIES = ("graphtune", "graphtune, no mask", "trl")


def examples(count: int, length: int) -> list[dict[str, Any]]:
    import numpy as np

    random = np.random.default_rng(0)
    sizes = np.clip(np.exp(random.normal(5.3, 1.0, count)), 8, length).astype(int)
    found = []
    for size in sizes:
        ids = random.integers(10, 32_000, size).tolist()
        prompt = size // 3
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def graphtune_batches(rows: list[dict[str, Any]], args: Any) -> Callable[[], Iterable[Any]]:
    from graphtune.data.batching import Batching
    from graphtune.data.dataset import Dataset
    from graphtune.data.loader import Loader

    dataset = Dataset.build(rows, max_length=None)
    batching = Batching(args.mode, args.batch, args.length)
    device = None if "no mask" in args.library else "cpu"
    return lambda: Loader(dataset, batching, workers=args.workers, device=device)


def trl_batches(rows: list[dict[str, Any]], args: Any) -> Callable[[], Iterable[Any]]:
    import datasets
    from torch.utils.data import DataLoader
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    datasets.disable_caching()
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(rows)

    def make() -> DataLoader:
        packed = args.mode == "packed"
        return DataLoader(
            pack_dataset(table, args.length, "bfd") if packed else table,
            batch_size=args.batch,
            shuffle=True,
            num_workers=args.workers,
            collate_fn=DataCollatorForLanguageModeling(0, padding_free=packed),
        )

    return make


def measure(args: Any) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    rows = examples(args.examples, args.length)
    make = (trl_batches if args.library == "trl" else graphtune_batches)(rows, args)
    start = time.perf_counter()
    batches = iter(make())
    slots = next(batches)["input_ids"].numel()
    first = time.perf_counter() - start
    for batch in batches:
        slots += batch["input_ids"].numel()
    seconds = time.perf_counter() - start
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {"tokens_per_s": tokens / seconds, "filled": tokens / slots, "first_s": first}


def run_alone(library: str, mode: str, workers: int, args: Any) -> dict[str, float]:
    command = [sys.executable, __file__, "--library", library, "--mode", mode]
    for name, value in {**vars(args), "workers": workers}.items():
        if name not in ("library", "mode"):
            command += [f"--{name}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--library", choices=LIBRARIES, help="run this one only, print JSON")
    parser.add_argument("--mode", choices=MODES, default="packed")
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    if args.library:
        print(json.dumps(measure(args)))
        return
    if importlib.util.find_spec("trl") is None:
        sys.exit("this compares with TRL, which is not installed: pip install trl")
    print(f"{'':38} {'tokens/s':>11} {'ratio':>6} {'filled':>7} {'first batch s':>14}")
    for mode in MODES:
        for workers in WORKERS:
            results = {name: run_alone(name, mode, workers, args) for name in LIBRARIES}
            for name, result in results.items():
                ratio = result["tokens_per_s"] / results["trl"]["tokens_per_s"]
                print(
                    f"{f'{mode}, {workers} workers, {name}':38} {result['tokens_per_s']:11,.0f} "
                    f"{ratio:6.2f} {result['filled']:7.1%} {result['first_s']:14.2f}"
                )


if __name__ == "__main__":
    main()
