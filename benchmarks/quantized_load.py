"""Peak memory of getting an NF4 base: streamed through `Quantize`, or loaded whole and converted.

    python benchmarks/quantized_load.py [--layers 16] [--width 2048]

Makes a random Llama checkpoint in bfloat16 safetensors and loads it in two processes, one after
the other: by graphtune, weight by weight, and as torchtune does, the whole model first and then
torchao's `to_nf4` on each linear. Prints by how much resident memory rose at most, beside the size
of what was loaded; the bound for graphtune is 1.3 times that plus the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


def resident(kind: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process, in bytes."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def make_checkpoint(folder: str, layers: int, width: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 11 // 4 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")


def load_graphtune(folder: str) -> tuple[int, list[torch.Tensor]]:
    import graphtune as gt
    from graphtune.passes import Quantize

    model = gt.load_model(folder, device="meta", dtype="bfloat16")
    empty = gt.capture(model).apply(Quantize("nf4"))
    del model
    before = reset_peak()
    program = gt.load_weights(empty, device="cpu")
    return before, [*program.parameters(), *program.buffers()]


def load_whole(folder: str) -> tuple[int, list[torch.Tensor]]:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
    from transformers import AutoModelForCausalLM

    to_nf4(torch.randn(128, 128, dtype=torch.bfloat16))  # imports
    before = reset_peak()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tensors: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            stored = to_nf4(module.weight.detach())
            module.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            tensors += [stored.quantized_data, stored.quantized_scalers, stored.nf4]
            tensors += [stored.quantization_factor, stored.scaler_mean]
    return before, [*tensors, *model.parameters(), *model.buffers()]


def child(which: str, folder: str) -> None:
    before, tensors = {"graphtune": load_graphtune, "whole": load_whole}[which](folder)
    peak = resident("VmHWM") - before
    size = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
    print(json.dumps({"peak": peak, "size": size}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_checkpoint(args.make[0], *map(int, args.make[1:]))
        return
    if args.child:
        child(*args.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        shape = [str(args.layers), str(args.width)]
        subprocess.run([sys.executable, __file__, "--make", folder, *shape], check=True)
        whole = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        largest = 32000 * args.width * 2
        print(
            f"checkpoint {whole / 1e6:,.0f} MB in bfloat16, largest tensor {largest / 1e6:,.0f} MB"
        )
        results = {}
        for which in ("graphtune", "whole"):
            command = [sys.executable, __file__, "--child", which, folder]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[which] = json.loads(out.splitlines()[-1])
            peak, size = (results[which][key] / 1e6 for key in ("peak", "size"))
            print(
                f"{which:10} peak {peak:7,.0f} MB for {size:,.0f} MB kept, {peak / size:.2f} times"
            )
        ours = results["graphtune"]
        bound = 1.3 * ours["size"] + largest
        print(
            f"bound      {bound / 1e6:12,.0f} MB: {'kept' if ours['peak'] < bound else 'EXCEEDED'}"
        )
        print(f"whole / graphtune: {results['whole']['peak'] / ours['peak']:.2f} times the memory")


if __name__ == "__main__":
    main()
