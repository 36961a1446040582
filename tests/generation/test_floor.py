"""What a step of decoding reads at least."""

import torch

import graphtune as gt
from graphtune.generation.floor import bytes_per_token, read_bandwidth
from graphtune.passes import KVCache, Quantize
from tests.oracles.models import tiny_model


def test_bytes_are_weights_and_cache_without_an_embedding_that_is_no_head():
    tied, untied = (gt.capture(tiny_model(family)) for family in ("llama", "qwen2"))
    rotary = 4 * 4
    for program, table in ((tied, 0), (untied, 128 * 32 * 4)):
        weights = sum(p.numel() * 4 for p in program.parameters())
        cache = 2 * 2 * 32 * 8 * 4 * 2  # heads, positions, channels; keys and values; layers
        cached = program.apply(KVCache(32))
        assert bytes_per_token(cached) == weights - table + cache + rotary
    small = tied.apply(Quantize(format="int8"))
    assert bytes_per_token(small) < 0.6 * bytes_per_token(tied)


def test_bandwidth_is_measured():
    found = read_bandwidth(torch.device("cpu"), repeats=1)
    assert 1e7 < found < 1e13
