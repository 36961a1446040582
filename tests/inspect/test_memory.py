"""Estimated memory of a training step against what the allocator says of a real one."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

import graphtune as gt
from graphtune.models.loading import empty_model
from graphtune.passes import DoRA, Full, LoRA, Pass, Quantize
from graphtune.program import Program


def model(kind: str) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 2000,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    if kind == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=True))
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, head_dim=16, **experts))


def batch_of(batch: int, seq: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 2000, (batch, seq))
    return {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": torch.ones(batch, 1, seq, seq, dtype=torch.bool).tril(),
        "position_ids": torch.arange(seq).expand(batch, -1).contiguous(),
    }


def measured(program: Program, optimizer: torch.optim.Optimizer, batch: int, seq: int) -> int:
    """The most bytes that tensors hold in a step, by the allocator's own events."""
    step = gt.compile_step(program, optimizer, compile=False)
    data = batch_of(batch, seq)
    step(data)  # the optimizer's state is there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(data)
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    kept = [*program.parameters(), *program.buffers()]
    kept += [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return peak + sum(sizes.values())


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


CASES: list[tuple[str, Sequence[Pass], Any, int, int]] = [
    ("llama", [Full()], torch.optim.AdamW, 2, 64),
    ("llama", [Full()], sgd, 4, 32),
    ("llama", [LoRA(rank=8)], torch.optim.AdamW, 4, 64),
    ("llama", [DoRA(rank=4)], torch.optim.AdamW, 2, 32),
    ("llama", [Quantize("nf4"), LoRA(rank=8)], torch.optim.AdamW, 2, 64),
    ("moe", [LoRA(rank=4)], torch.optim.AdamW, 2, 32),
    ("llama", [LoRA(rank=8)], torch.optim.AdamW, 1, 256),
]


@pytest.mark.parametrize(("kind", "passes", "make", "batch", "seq"), CASES)
def test_the_estimate_is_what_a_step_takes(
    kind: str, passes: Sequence[Pass], make: Callable[..., Any], batch: int, seq: int
) -> None:
    program = gt.capture(model(kind)).apply(*passes)
    found = program.memory(batch, seq, optimizer=make)
    optimizer = make(list(program.trainable_parameters()))
    expected = measured(program, optimizer, batch, seq)
    assert found.total == pytest.approx(expected, rel=0.05)
    trainable = sum(p.numel() for p in program.trainable_parameters()) * 4
    assert found.gradients == trainable
    state = 2 * trainable if make is torch.optim.AdamW else 0
    assert found.optimizer == pytest.approx(state, rel=0.01)


def test_no_weights_are_needed_or_changed() -> None:
    program = gt.capture(model("llama")).apply(LoRA(rank=8))
    before = {name: p.detach().clone() for name, p in program.named_parameters()}
    expected = program.memory(2, 32)
    assert all(torch.equal(p, before[name]) for name, p in program.named_parameters())
    empty = empty_model(model("llama").config, torch.float32).to("meta")
    assert gt.capture(empty).apply(LoRA(rank=8)).memory(2, 32) == expected
    assert str(expected).splitlines()[-1].startswith("total")


def test_more_tokens_take_more() -> None:
    program = gt.capture(model("llama")).apply(LoRA(rank=8))
    small, wide, long = (program.memory(b, s) for b, s in ((2, 32), (4, 32), (2, 64)))
    assert small.parameters == wide.parameters == long.parameters
    assert 1.8 < wide.activations / small.activations < 2.2
    assert long.activations > 1.8 * small.activations
