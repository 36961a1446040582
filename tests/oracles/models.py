"""Tiny random `transformers` models of many families."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 128
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
# Windows are shorter than the sequences that tests run, so that ignoring them shows.
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=8),
    # Scores and logits are capped where it shows; its attention is eager, and adds its mask.
    "gemma2": lambda: Gemma2Config(
        **_SHAPE,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=4.0,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=6),
    "mixtral": lambda: MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "phi3": lambda: Phi3Config(**_SHAPE),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
}

# Their experts are sorted and counted by token, which ExecuTorch has no operators for.
MIXTURES = ("mixtral", "qwen3_moe")


def tiny_model(family: str, seed: int = 0, positions: int = 128) -> nn.Module:
    """A random model in train mode, without dropout."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    config.max_position_embeddings = positions
    model = AutoModelForCausalLM.from_config(config)  # sdpa, where it can
    # As initialised, a residual stream is so small that many errors would round away.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5)
    return model.train()


def tiny_gpt2(dropout: float = 0.0, seed: int = 0, positions: int = 128) -> nn.Module:
    """A model with `Conv1D` linears, learned positions and dropout of three kinds."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=positions,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(logits: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a scalar that depends on every logit unevenly, by parameter name."""
    weights = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    loss = (logits * weights).sum() + logits.logsumexp(-1).sum()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bitwise, and by name."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), (
            f"{name} differs by {(found[name] - tensor).abs().max().item():.3g}"
        )
