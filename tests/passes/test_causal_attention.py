"""Attention without a mask, and with keys and values that heads share."""

import pytest
import torch

import graphtune as gt
from graphtune.losses import cross_entropy
from graphtune.passes import CausalAttention, Full, GroupedAttention
from tests.oracles.models import random_ids, tiny_gpt2, tiny_model
from tests.oracles.saved import saved_tensors

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def attentions(graph):
    return graph.find_nodes(op="call_function", target=SDPA)


def base(family):
    return gt.capture(tiny_model(family)).apply(Full())


@pytest.mark.parametrize(
    ("family", "causal"), [("llama", 2), ("phi3", 2), ("gemma3", 1), ("mistral", 0), ("gemma2", 0)]
)
def test_only_attention_to_all_earlier_tokens_loses_its_mask(family, causal):
    """Windows need theirs; eager attention, of gemma2, adds it."""
    before = base(family)
    program = before.apply(CausalAttention())
    assert str(program.graph) == str(before.graph)
    assert len(program.ledger[-1].sites) == causal
    if not causal:
        assert program.unmasked is None
        return
    nodes = attentions(program.unmasked.graph)
    assert sum(node.args[3] is None and node.kwargs["is_causal"] for node in nodes) == causal


def test_a_step_without_a_mask_saves_none():
    program = base("llama").apply(CausalAttention())
    ids = random_ids(2, 16)
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool).tril()

    def quadratic(*inputs):
        own = (*program.parameters(), ids, mask)
        _, saved = saved_tensors(lambda: program(*inputs).sum(), own)
        return [tensor for tensor in saved if tensor.shape[-2:] == (16, 16)]

    assert quadratic(ids, mask)
    assert not quadratic(ids)


def test_padding_at_the_end_needs_no_mask():
    """The loss and all gradients are those of the mask that hides the padding."""
    program = base("llama").apply(GroupedAttention(), CausalAttention())
    ids = random_ids(3, 12)
    padding = torch.ones_like(ids)
    labels = ids.clone()
    for row, length in enumerate((12, 7, 3)):
        padding[row, length:] = 0
        labels[row, length:] = -100
    results = []
    for mask in (None, padding):
        loss = cross_entropy(program(ids, mask), labels)
        results.append([loss, *torch.autograd.grad(loss, list(program.parameters()))])
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_modes_and_moves_reach_the_second_graph():
    program = gt.capture(tiny_gpt2(dropout=0.5)).apply(CausalAttention())
    ids = random_ids(2, 9)
    assert not torch.equal(program(ids), program(ids))
    program.eval()
    assert torch.equal(program(ids), program(ids))
    program.to("meta")
    assert program(ids.to("meta")).is_meta


@pytest.mark.parametrize(("family", "heads"), [("llama", 4), ("qwen3", 4), ("gemma3", 4)])
def test_keys_and_values_are_saved_once_for_all_heads_that_share_them(family, heads):
    before = base(family)
    after = before.apply(GroupedAttention())
    for node in attentions(after.graph):
        query, key, value = (one.meta["val"].shape[1] for one in node.args[:3])
        assert (query, key, value) == (heads, 2, 2) and node.kwargs["enable_gqa"]
    ids = random_ids(2, 16)
    sizes = []
    for program in (before, after):
        own = (*program.parameters(), ids)
        _, saved = saved_tensors(lambda program=program: program(ids).sum(), own)
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in saved))
    # Of both layers, keys and values of 2 rows, 2 heads fewer, 16 tokens, 8 wide, in float32; what
    # is saved of the values before that (a view of the linear's output) may come to it.
    assert sizes[0] - sizes[1] >= 2 * 2 * 2 * 16 * 8 * 4


def test_heads_that_share_nothing_stay_as_they_are():
    program = gt.capture(tiny_gpt2()).apply(GroupedAttention())
    assert program.ledger[-1].sites == ()
