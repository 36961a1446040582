"""SharedMask: the same bits from one additive mask."""

import pytest
import torch

import graphtune as gt
from graphtune.masks import causal_mask
from graphtune.passes import CausalAttention, Full, SharedMask
from graphtune.passes.shared_mask import attention_mask
from tests.oracles.models import FAMILIES, gradients, random_ids, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_with_any_mask(family):
    program = gt.capture(tiny_model(family)).apply(Full())
    shared = program.apply(SharedMask())
    ids = random_ids(2, 11)
    packed = causal_mask(ids, None).clone()
    packed[:, :, 5:, :5] = False
    for mask in (None, packed, torch.ones(2, 11).index_fill(1, torch.tensor([0, 1]), 0)):
        expected, found = program(ids, mask), shared(ids, mask)
        assert torch.equal(found, expected)
        before, after = gradients(expected, program), gradients(found, shared)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_all_layers_read_one_mask():
    program = gt.capture(tiny_model("llama")).apply(SharedMask())
    attentions = [n for n in program.graph.nodes if "scaled_dot_product" in str(n.target)]
    (mask,) = {attention_mask(node) for node in attentions}
    assert len(attentions) == 2
    assert mask.meta["val"].dtype == torch.float32
    assert program.ledger[-1].nodes == 3


def test_causal_attention_still_knows_the_mask():
    program = gt.capture(tiny_model("llama")).apply(SharedMask(), CausalAttention())
    attentions = [n for n in program.unmasked.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert all(attention_mask(node) is None for node in attentions)
