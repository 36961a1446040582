"""Our decoder computes what `transformers` computes from the same weights, family by family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)

import graphtune as gt
from graphtune.errors import UserError
from graphtune.models.families import build_model
from graphtune.sites import find_sites
from tests.oracles.models import FAMILIES, gradients, random_ids, tiny_model

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LAYERS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONG = [4.0, 6.0, 9.0]


def stretched(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **parameters}}


# Sequences in these tests are 14 tokens and longer: beyond "original" lengths of 8 and 12.
MORE: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=8),
    "granite": lambda: GraniteConfig(
        **SHAPE,
        embedding_multiplier=12.0,
        attention_multiplier=0.1,
        residual_multiplier=0.3,
        logits_scaling=8.0,
    ),
    "starcoder2": lambda: Starcoder2Config(**SHAPE, sliding_window=6),
    "smollm3": lambda: SmolLM3Config(**SHAPE, no_rope_layers=[1, 0]),
    "smollm3 with windows": lambda: SmolLM3Config(
        **SHAPE, no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=5
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=40),
    "qwen2_moe, normalized, every other layer": lambda: Qwen2MoeConfig(
        **SHAPE,
        **EXPERTS,
        shared_expert_intermediate_size=40,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        use_sliding_window=True,
        sliding_window=5,
    ),
    "qwen3_moe, normalized": lambda: Qwen3MoeConfig(
        **SHAPE, **EXPERTS, head_dim=8, norm_topk_prob=True, mlp_only_layers=[0]
    ),
    "qwen2 with windows": lambda: Qwen2Config(**SHAPE, **LAYERS, use_sliding_window=True),
    "a window longer than the sequence": lambda: MistralConfig(**SHAPE, sliding_window=64),
    "biases and exact gelu": lambda: LlamaConfig(
        **SHAPE, attention_bias=True, mlp_bias=True, hidden_act="gelu"
    ),
    "linear": lambda: Gemma3TextConfig(
        **SHAPE,
        **LAYERS,
        head_dim=8,
        final_logit_softcapping=4.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "dynamic": lambda: LlamaConfig(
        **SHAPE | {"max_position_embeddings": 12}, **stretched("dynamic", factor=3.0)
    ),
    "llama3": lambda: LlamaConfig(
        **SHAPE,
        **stretched(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8,
        ),
    ),
    "yarn": lambda: Qwen2Config(
        **SHAPE | {"max_position_embeddings": 32},
        **stretched("yarn", factor=4.0, original_max_position_embeddings=8),
    ),
    "yarn, as DeepSeek's": lambda: LlamaConfig(
        **SHAPE | {"max_position_embeddings": 32},
        **stretched(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=8,
            mscale=1.0,
            mscale_all_dim=0.5,
            beta_fast=4.0,
            beta_slow=0.1,
            truncate=False,
        ),
    ),
    "longrope": lambda: Phi3Config(
        **SHAPE,
        original_max_position_embeddings=8,
        **stretched(
            "longrope", short_factor=[1.0, 1.1, 1.2], long_factor=LONG, partial_rotary_factor=0.75
        ),
    ),
    "longrope not reached": lambda: Phi3Config(
        **SHAPE,
        original_max_position_embeddings=64,
        **stretched(
            "longrope", short_factor=[1.0, 1.1, 1.2], long_factor=LONG, partial_rotary_factor=0.75
        ),
    ),
}
ALL = {**FAMILIES, **MORE}


def theirs_and_ours(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs: Any = AutoModelForCausalLM.from_config(ALL[name]())
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5)  # so that errors do not round away
            elif "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) / 4)
    ours = build_model(theirs.config)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(), ours.train()


def windows_of(config: Any) -> dict[str, int | None]:
    """The window of each kind of layer, as `transformers` has it."""
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None) or None
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def run_theirs(model: Any, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Logits for a boolean mask (batch, 1, seq, seq), with windows laid in by hand."""
    index = torch.arange(ids.shape[1])
    masks = {}
    for kind, window in windows_of(model.config).items():
        seen = mask if window is None else mask & (index[:, None] - index < window)
        if model.config._attn_implementation == "eager":
            seen = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        masks[kind] = seen
    given = masks if len(masks) > 1 else next(iter(masks.values()))
    layered = getattr(model.config, "model_type", "") in ("gemma2", "gemma3_text")
    return model(
        input_ids=ids,
        attention_mask=masks if layered else given,
        position_ids=positions,
        use_cache=False,
    ).logits


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    assert expected.isfinite().all() and expected.abs().max() > 0, what
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"{what} differs by {error:.3g}"


def packed(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """A mask of two sequences in a row, and positions that start anew with the second."""
    index, start = torch.arange(length), 5
    same = (index[:, None] < start) == (index < start)
    mask = (same & (index <= index[:, None])).expand(batch, 1, -1, -1)
    positions = torch.where(index < start, index, index - start).expand(batch, -1)
    return mask.contiguous(), positions.contiguous()


@pytest.mark.parametrize("name", ALL)
def test_logits_and_gradients_equal_theirs(name: str) -> None:
    theirs, ours = theirs_and_ours(name)
    ids = random_ids(2, 17)
    ids[:, 5] = 0  # padding, whose embedding gets no gradient from where it is read
    expected = theirs(input_ids=ids, use_cache=False).logits
    found = ours(ids)
    assert found.shape == (2, 17, 128)
    assert_close(found, expected, "logits")
    expected_gradients, found_gradients = gradients(expected, theirs), gradients(found, ours)
    assert found_gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        assert_close(found_gradients[parameter], gradient, f"gradient of {parameter}")


@pytest.mark.parametrize("name", ALL)
def test_a_padded_batch_equals_theirs(name: str) -> None:
    theirs, ours = theirs_and_ours(name)
    ids = random_ids(3, 14)
    padding = torch.ones(3, 14, dtype=torch.int64)
    padding[0, :4] = 0
    padding[1, 9:] = 0
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    options = {"attention_mask": padding, "position_ids": positions}
    expected = theirs(input_ids=ids, **options, use_cache=False).logits
    found = ours(ids, **options)
    assert_close(found[padding.bool()], expected[padding.bool()], "logits")
    loss = found[padding.bool()].logsumexp(-1).sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(ours.parameters())))


@pytest.mark.parametrize("name", ALL)
def test_a_packed_batch_equals_theirs(name: str) -> None:
    theirs, ours = theirs_and_ours(name)
    ids = random_ids(2, 16)
    mask, positions = packed(2, 16)
    expected = run_theirs(theirs, ids, mask, positions)
    found = ours(ids, mask, positions)
    assert_close(found, expected, "logits")
    expected_gradients, found_gradients = gradients(expected, theirs), gradients(found, ours)
    for parameter, gradient in expected_gradients.items():
        assert_close(found_gradients[parameter], gradient, f"gradient of {parameter}")


@pytest.mark.parametrize(
    ("long", "short"),
    [("longrope", "longrope not reached"), ("mistral", "a window longer than the sequence")],
)
def test_what_depends_on_the_length_shows(long: str, short: str) -> None:
    """The pairs above differ in nothing else, so the tests that compare them can fail."""
    (_, one), (_, other) = theirs_and_ours(long), theirs_and_ours(short)
    other.load_state_dict(one.state_dict())
    ids = random_ids(2, 17)
    assert not torch.allclose(one(ids), other(ids), rtol=1e-3)


def test_dropout_is_drawn_as_theirs_is() -> None:
    config = Starcoder2Config(
        **SHAPE, attention_dropout=0.2, residual_dropout=0.1, embedding_dropout=0.1
    )
    theirs: Any = AutoModelForCausalLM.from_config(config).train()
    ours = build_model(config).train()
    ours.load_state_dict(theirs.state_dict())
    ids = random_ids(2, 17)
    torch.manual_seed(3)
    expected = theirs(input_ids=ids, use_cache=False).logits
    torch.manual_seed(3)
    found = ours(ids)
    assert_close(found, expected, "logits")
    assert not torch.allclose(found, ours(ids))
    assert_close(ours.eval()(ids), theirs.eval()(input_ids=ids, use_cache=False).logits, "logits")


def test_half_precision_is_near_theirs() -> None:
    for name in ("gemma2", "qwen3_moe"):
        theirs, ours = (model.bfloat16() for model in theirs_and_ours(name))
        ids = random_ids(2, 17)
        found, expected = ours(ids), theirs(input_ids=ids, use_cache=False).logits
        assert found.dtype == torch.bfloat16
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


# --- captured ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "linear", "phi3", "longrope", "dynamic", "qwen2_moe", "smollm3"]
)
def test_captured_it_computes_the_same(name: str) -> None:
    _, model = theirs_and_ours(name)
    program = gt.capture(model)
    assert program.state_dict().keys() == model.state_dict().keys()
    for batch, length in ((2, 17), (4, 6)):
        ids = random_ids(batch, length)
        mask, positions = packed(batch, length)
        assert_close(program(ids, mask, positions), model(ids, mask, positions), "logits")
        expected, found = gradients(model(ids), model), gradients(program(ids), program)
        for parameter, gradient in expected.items():
            assert_close(found[parameter], gradient, f"gradient of {parameter}")


@pytest.mark.parametrize("name", ["phi3", "qwen2_moe"])
def test_captured_it_has_the_sites_of_theirs(name: str) -> None:
    theirs, ours = theirs_and_ours(name)
    found, expected = (
        {
            (s.name, s.kind, s.shape, s.in_all_linear)
            for s in find_sites(gt.capture(m).graph)
            if s.weight
        }
        for m in (ours, theirs)
    )
    assert found == expected
    assert any(kind == "experts" for _, kind, _, _ in found) == (name == "qwen2_moe")


# --- refused ----------------------------------------------------------------------------------


def test_masks_that_are_none_are_refused() -> None:
    model = build_model(FAMILIES["llama"]())
    ids = random_ids(2, 6)
    for mask in (torch.zeros(2, 1, 6, 6), torch.ones(2, 6, 6, dtype=torch.bool)):
        with pytest.raises(UserError, match="attention_mask"):
            model(ids, mask)


def test_the_tied_head_is_the_embedding() -> None:
    model = build_model(tiny_model("llama").config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.to(torch.bfloat16).lm_head.weight is model.model.embed_tokens.weight
