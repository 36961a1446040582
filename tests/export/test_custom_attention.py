"""ExecuTorch's attention kernels compute what the program's own attention does."""

import pytest
import torch

import graphtune as gt
from graphtune.errors import UserError
from graphtune.export import to_executorch
from graphtune.export.custom_attention import with_custom_attention
from graphtune.export.device_calls import load
from graphtune.passes import KVCache
from tests.export.test_executorch import VOCAB, tiny_llama
from tests.export.test_executorch_cache import continued, greedy
from tests.oracles.models import random_ids, tiny_model

LENGTH, PREFILL = 64, 8


def kernels(graph):
    return [str(n.target) for n in graph.nodes if str(n.target).startswith("llama.")]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_graph_computes_what_the_program_does(family):
    model = tiny_model(family, positions=LENGTH).eval()
    cached = gt.capture(model).apply(KVCache(LENGTH, prefill=PREFILL)).eval()
    graph = with_custom_attention(cached)
    writes = kernels(graph.graph).count("llama.update_cache.default")
    assert writes == 2 * kernels(graph.graph).count("llama.custom_sdpa.default") > 0
    ids = random_ids(1, 20)
    expected = model(ids, use_cache=False).logits
    for start, end in [(0, 8), (8, 15), (15, 16), (16, 20)]:
        found = graph(ids[:, start:end], torch.arange(start, end)[None])
        torch.testing.assert_close(found, expected[:, start:end], rtol=1e-4, atol=1e-5)


def test_the_program_keeps_its_own_caches():
    cached = gt.capture(tiny_model("llama", positions=LENGTH)).apply(KVCache(LENGTH)).eval()
    before = {name: buffer.shape for name, buffer in cached.named_buffers()}
    with_custom_attention(cached)
    assert {name: buffer.shape for name, buffer in cached.named_buffers()} == before
    assert not kernels(cached.graph)


def test_refusals(tmp_path):
    windows = gt.capture(tiny_model("mistral", positions=LENGTH))
    with pytest.raises(UserError, match="the model has none"):
        with_custom_attention(windows.apply(KVCache(LENGTH)))
    with pytest.raises(UserError, match="`custom_sdpa` is for files with a key-value cache"):
        to_executorch(windows, tmp_path / "out", kv_cache=False, custom_sdpa=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_file_decodes_as_transformers_does(tmp_path):
    model = tiny_llama(None).eval()
    options = {"max_seq_len": LENGTH, "prefill": PREFILL, "custom_sdpa": True}
    made = to_executorch(gt.capture(model), tmp_path / "out", **options)
    assert made.coverage["llama_custom_sdpa_default"][1] == 2
    prompt, run = random_ids(1, 2 * PREFILL + 3) % VOCAB, load(made.path)
    assert greedy(run, prompt, 40) == continued(model, prompt, 40)
    with pytest.raises(RuntimeError):  # beyond the last position
        run(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([LENGTH]))
