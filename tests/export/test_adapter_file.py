"""One program on a device runs with the file of any adapter of the same options."""

import copy

import pytest
import torch
from torch import fx

import graphtune as gt
from graphtune.errors import UserError
from graphtune.export import to_executorch
from graphtune.export.adapter_file import with_adapter_inputs
from graphtune.export.artifact import fingerprint
from graphtune.export.device_calls import load
from graphtune.passes import DoRA, KVCache, LoRA
from tests.export.test_executorch import VOCAB, tiny_llama
from tests.export.test_executorch_cache import continued, greedy
from tests.oracles.models import random_ids, tiny_gpt2, tiny_model

LENGTH, PREFILL = 64, 8
OPTIONS = {"max_seq_len": LENGTH, "prefill": PREFILL}


def adapted(model, seed, one=None):
    """A program with an adapter, and random numbers in it."""
    program = gt.capture(model).apply(one or LoRA(rank=4)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            parameter.normal_(std=0.2)
    return program


def merged_by_hand(program):
    """A model of transformers whose weights hold what the adapter adds."""
    model = tiny_llama(None).eval()
    factors = dict(program.named_parameters())
    with torch.no_grad():
        for name, module in model.named_modules():
            if (a := factors.get(f"{name}.lora_A.default.weight")) is not None:
                module.weight += 4 * factors[f"{name}.lora_B.default.weight"] @ a
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "phi3"])
def test_the_graph_computes_what_the_program_does(family):
    model = tiny_gpt2() if family == "gpt2" else tiny_model(family, positions=LENGTH)
    program = adapted(model.eval(), 1)
    cached = program.apply(KVCache(LENGTH, prefill=PREFILL)).eval()
    graph = with_adapter_inputs(fx.GraphModule(cached, copy.deepcopy(cached.graph)))
    ids = random_ids(1, 12)
    expected = program(ids)
    for start, end in [(0, 8), (8, 11), (11, 12)]:
        found = graph(ids[:, start:end], torch.arange(start, end)[None])
        torch.testing.assert_close(found, expected[:, start:end], rtol=1e-4, atol=1e-5)
    assert {n: p.shape for n, p in cached.named_parameters()} == {
        n: p.shape for n, p in program.named_parameters()
    }


def test_the_same_program_runs_with_another_adapter(tmp_path):
    programs = [adapted(tiny_llama(None).eval(), seed) for seed in (1, 2)]
    made = [
        to_executorch(program, tmp_path / str(i), adapter_file=True, **OPTIONS)
        for i, program in enumerate(programs)
    ]
    first, second = (report.path.parent for report in made)
    assert fingerprint(first / "model.pte") == fingerprint(second / "model.pte")
    assert fingerprint(first / "adapter.ptd") != fingerprint(second / "adapter.ptd")
    assert made[0].coverage["aten_bmm_default"][1] == 0  # all of them in delegates

    prompt = random_ids(1, 2 * PREFILL + 3) % VOCAB
    answers = [continued(merged_by_hand(program), prompt, 40) for program in programs]
    assert answers[0] != answers[1]
    for folder, answer in zip((first, second), answers, strict=True):
        run = load(first / "model.pte", folder / "adapter.ptd")
        assert greedy(run, prompt, 40) == answer


def test_refusals(tmp_path):
    base = tiny_llama(None).eval()

    def export(program, **options):
        to_executorch(program, tmp_path / "out", adapter_file=True, **OPTIONS | options)

    with pytest.raises(UserError, match="no adapter apart from its weights"):
        export(gt.capture(base))
    with pytest.raises(UserError, match="lora_A.* is more than the weight of a linear"):
        export(adapted(base, 0, DoRA(rank=4)))
    whole = adapted(base, 0, LoRA(rank=4, targets=("q_proj",), modules_to_save=("o_proj",)))
    with pytest.raises(UserError, match="modules_to_save.* is not a factor of LoRA"):
        export(whole)
    with pytest.raises(UserError, match="trained biases"):
        export(adapted(tiny_gpt2().eval(), 0, LoRA(rank=4, bias="all")))
    program = adapted(base, 0)
    with pytest.raises(UserError, match="`adapter_file` is for files with a key-value cache"):
        export(program, kv_cache=False)
    with pytest.raises(UserError, match="reads one file of weights"):
        export(program, split_weights=True)
    assert not list(tmp_path.iterdir())
