"""What is kept between the forward and the backward pass, by mode of activation checkpointing.

Bytes are counted, nothing is timed: the tensors that a compiled step's forward hands on to its
backward (of an eager one, all that are alive then), without parameters and the batch, each storage
once. The partitioner is inductor's; code is not generated, which changes no count. Beside it stands
transformers' model with PEFT's LoRA, as it is and with `gradient_checkpointing_enable()`.

    python benchmarks/activation_memory.py --layers 30
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import graphtune as gt
from graphtune.inspect.memory import _Live
from graphtune.losses import cross_entropy
from graphtune.passes import ActivationCheckpoint, LoRA
from graphtune.recomputation import as_tagged

BACKEND = "aot_eager_decomp_partition"
MODES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "selective, up_proj saved": {"mode": "selective", "save": ["up_proj"]},
    "selective": {"mode": "selective"},
    "full": {"mode": "full"},
    **{f"budget {b:g}": {"mode": "budget", "budget": b} for b in (0.75, 0.5, 0.25, 0.1)},
}


def make_model(layers: int) -> nn.Module:
    """SmolLM2-135M's shapes with a small vocabulary: logits are not what is compared."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).train()


def saved_mib(forward: Callable[[], Tensor], own: Sequence[Tensor]) -> float:
    """MiB that autograd saves for the backward pass of a loss, without the tensors `own`."""
    there = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in there) / 2**20


def alive_mib(forward: Callable[[], Tensor], own: Sequence[Tensor]) -> float:
    """MiB that are alive after an eager forward, without the tensors `own`; of a checkpointed one
    `saved_mib` would not see what `torch.utils.checkpoint` holds."""
    with _Live() as live:
        live.count(own)
        before = live.now
        loss = forward()
        gc.collect()
        assert loss.requires_grad
        return (live.now - before) / 2**20


def ours(base: gt.Program, ids: Tensor, options: dict[str, Any]) -> float:
    program = base.apply(LoRA(rank=8), ActivationCheckpoint(**options))
    mask = torch.ones(len(ids), 1, *2 * ids.shape[1:], dtype=torch.bool).tril()
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()

    @torch.compile(backend=BACKEND, fullgraph=True)
    def loss() -> Tensor:
        return cross_entropy(program(ids, mask, positions), ids)

    own = (*program.parameters(), *program.buffers(), ids, mask, positions)
    with as_tagged(program):
        return saved_mib(loss, own)


def theirs(layers: int, ids: Tensor, *, again: bool, compiled: bool) -> float:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(make_model(layers), LoraConfig(r=8, target_modules=targets))
    if again:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss() -> Tensor:
        return cross_entropy(model(input_ids=ids, use_cache=False).logits, ids)

    own = (*model.parameters(), *model.buffers(), ids)
    return (
        saved_mib(torch.compile(loss, backend=BACKEND), own) if compiled else alive_mib(loss, own)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    ids = torch.randint(0, 1024, (args.batch, args.length))
    rows = {}
    for compiled in (False, True):
        how = "compiled" if compiled else "eager"
        for again in (False, True):
            name = f"PEFT {how}" + (", gradient checkpointing" if again else "")
            torch._dynamo.reset()
            rows[name] = theirs(args.layers, ids, again=again, compiled=compiled)
    base = gt.capture(make_model(args.layers))
    for mode, options in MODES.items():
        torch._dynamo.reset()
        rows[f"graphtune {mode}"] = ours(base, ids, options)
    unit = rows["PEFT eager"]
    print(f"LoRA r8, {args.layers} layers of SmolLM2-135M's shape, {args.batch} x {args.length}")
    print(f"{'':38} {'MiB':>9} {'of PEFT eager':>14}")
    for name, size in rows.items():
        print(f"{name:38} {size:9.1f} {size / unit:14.3f}")


if __name__ == "__main__":
    main()
