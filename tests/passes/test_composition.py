"""Adapters, storage, ties and biases compose, in any order."""

import copy
import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

import graphtune as gt
from graphtune.export.peft import from_peft, to_peft
from graphtune.passes import DoRA, Full, LoRA, Merge, Quantize
from tests.oracles.by_hand import ByHand, put_in
from tests.oracles.models import VOCAB, random_ids

STORAGE = ["float32", "bfloat16", "nf4", "int8"]


def tiny_llama(tied, bias, *, width=128, layers=1, heads=4, kv_heads=4, seed=0):
    """With the default sizes, every weight has whole scale blocks, which torchao's NF4 needs."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.train()


@functools.cache
def captured(tied, bias, dtype):
    model = tiny_llama(tied, bias).to(dtype)
    return model, gt.capture(model)


def shake(program, seed=3):
    """Trained-looking values, so that no part of an adapter is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_composition_is_what_one_would_write_by_hand(kind, storage, tied, bias):
    model, base = captured(tied, bias, torch.bfloat16 if storage == "bfloat16" else torch.float32)
    adapter = kind(rank=4, alpha=8, targets=["all-linear", "lm_head"])
    passes = [adapter]
    if storage in ("nf4", "int8"):
        passes = [adapter, Quantize(format=storage, targets=["all-linear", "lm_head"])]
    program = base.apply(*passes)
    shake(program)
    by_hand = copy.deepcopy(model)
    for site, own in adapter.adapted_sites(program.graph):
        factors = [program.get_parameter(name) for name in own.factors(site)]
        linear = by_hand.get_submodule(site.name)
        put_in(by_hand, site.name, ByHand(linear, storage, own.scaling, *factors))
    ids = random_ids(2, 9)
    found, expected = program(ids), by_hand(input_ids=ids, use_cache=False).logits
    assert found.dtype == expected.dtype
    if kind is LoRA:
        assert torch.equal(found, expected)
    else:
        tolerance = 0.05 if storage == "bfloat16" else 1e-4
        scale = expected.abs().max().item()
        torch.testing.assert_close(found / scale, expected / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_order_of_passes_does_not_matter(storage):
    base = gt.capture(tiny_llama(True, True))
    quantize = Quantize(format=storage)
    passes = (quantize, DoRA(rank=4), Full(targets=["model.norm"]))
    results = []
    for order in itertools.permutations(passes):
        torch.manual_seed(0)
        results.append(base.apply(*order))
    first = results[0]
    ids = random_ids(2, 7)
    for other in results[1:]:
        assert [str(n.target) for n in other.graph.nodes] == [
            str(n.target) for n in first.graph.nodes
        ]
        assert torch.equal(other(ids), first(ids))


def pytest_examples(count):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens"]
CASES = st.fixed_dictionaries(
    {
        "tied": st.booleans(),
        "bias": st.booleans(),
        "width": st.sampled_from([64, 128]),
        "layers": st.integers(1, 3),
        "heads": st.sampled_from([2, 4]),
        "kind": st.sampled_from([LoRA, DoRA]),
        "targets": st.lists(st.sampled_from(TARGETS), min_size=1, max_size=4, unique=True),
        "rank": st.integers(1, 16),
        "alpha": st.floats(0.5, 64),
        "rslora": st.booleans(),
        "storage": st.sampled_from([None, "nf4", "int8", "int4"]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "quantized_first": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


def check_case(case, folder):
    model = tiny_llama(
        case["tied"],
        case["bias"],
        width=case["width"],
        layers=case["layers"],
        heads=case["heads"],
        kv_heads=2,
        seed=case["seed"],
    ).to(case["dtype"])
    base = gt.capture(model)
    quantize = [Quantize(format=case["storage"])] if case["storage"] else []
    adapter = case["kind"](
        rank=case["rank"], alpha=case["alpha"], rslora=case["rslora"], targets=case["targets"]
    )
    passes = [*quantize, adapter] if case["quantized_first"] else [adapter, *quantize]
    stored = base.apply(*quantize)
    tuned = base.apply(*passes)
    ids = random_ids(2, 8, case["seed"])
    assert torch.equal(tuned(ids), stored(ids))  # an adapter starts as nothing
    shake(tuned, case["seed"])
    expected = tuned(ids)
    assert not torch.equal(expected, stored(ids))

    to_peft(tuned, folder)
    assert torch.equal(from_peft(stored, folder)(ids), expected)

    merged = tuned.apply(Merge(dequantize=True))(ids)
    scale = expected.abs().max().item()
    tolerance = 1e-4 if case["dtype"] == torch.float32 else 0.06
    torch.testing.assert_close(merged / scale, expected / scale, atol=tolerance, rtol=0)


@pytest_examples(6)
@given(case=CASES)
def test_merged_saved_and_reordered_are_the_same(case, tmp_path_factory):
    check_case(case, tmp_path_factory.mktemp("adapter"))


@pytest.mark.slow
@pytest_examples(60)
@given(case=CASES)
def test_merged_saved_and_reordered_are_the_same_at_length(case, tmp_path_factory):
    check_case(case, tmp_path_factory.mktemp("adapter"))
