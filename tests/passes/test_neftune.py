"""NEFTune's noise is transformers', bit for bit, and is gone in evaluation."""

import copy
import math

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

import graphtune as gt
from graphtune.noise import neftune
from graphtune.passes import LoRA, NEFTune
from tests.oracles.models import assert_same_tensors, gradients, random_ids, tiny_gpt2, tiny_model
from tests.oracles.peft import logits, peft_model, same_start


def noisy_reference(model, embedding, alpha):
    """The model with the hook that transformers' Trainer puts on its embedding."""
    embedding.neftune_noise_alpha = alpha
    embedding.register_forward_hook(neftune_post_forward_hook)
    return lambda ids: model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_training_is_transformers_with_its_hook(family):
    """Gemma's embedding scales its rows before, GPT-2 has a second one, of positions."""
    model = tiny_gpt2() if family == "gpt2" else tiny_model(family)
    program = gt.capture(copy.deepcopy(model)).apply(NEFTune(alpha=10))
    reference = noisy_reference(model, model.get_input_embeddings(), 10)
    for length in (9, 17):
        ids = random_ids(2, length)
        torch.manual_seed(3)
        found = program(ids)
        torch.manual_seed(3)
        expected = reference(ids)
        assert torch.equal(found, expected)
        assert_same_tensors(gradients(found, program), gradients(expected, model))


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_adapter_of_the_embedding_is_part_of_what_gets_noise(order):
    model = tiny_model("qwen2")
    lora = LoRA(rank=4, alpha=8, targets=["embed_tokens", "q_proj"])
    passes = (NEFTune(), lora) if order == "before" else (lora, NEFTune())
    program = gt.capture(model)
    for one in passes:
        program = program.apply(one)
    peft = peft_model(model, target_modules=["embed_tokens", "q_proj"])
    same_start(peft, program)
    embedding = peft.base_model.model.get_input_embeddings()
    noisy_reference(peft, embedding, 5.0)
    ids = random_ids(2, 8)
    torch.manual_seed(3)
    found = program(ids)
    torch.manual_seed(3)
    assert torch.equal(found, logits(peft, ids))


def test_evaluation_draws_nothing_and_is_the_model():
    model = tiny_model("llama")
    base = gt.capture(model)
    program = base.apply(NEFTune()).eval()
    ids = random_ids(2, 9)
    before = torch.get_rng_state()
    assert torch.equal(program(ids), base.eval()(ids))
    assert torch.equal(torch.get_rng_state(), before)
    exported = torch.export.export(program, (ids,), strict=False).run_decompositions()
    calls = [str(node.target) for node in exported.graph.nodes]
    assert not [call for call in calls if "neftune" in call or "uniform" in call]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_bounded_as_in_the_paper(dtype):
    torch.manual_seed(0)
    noise = neftune(torch.zeros(4, 50, 64, dtype=dtype), 5.0, True)
    bound = 5 / math.sqrt(50 * 64)
    assert noise.abs().max() <= bound * (1 + 1e-2)
    assert noise.float().std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(noise.float().mean()) < bound / 50


@pytest.mark.slow
def test_a_compiled_step_has_noise_of_each_length_without_recompiling():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    program = gt.capture(tiny_model("llama")).apply(LoRA(rank=2), NEFTune(alpha=40))
    step = gt.compile_step(program, torch.optim.SGD(program.trainable_parameters(), lr=0.0))
    losses = set()
    for length in (8, 8, 12, 12, 20, 20):
        ids = random_ids(2, length)
        losses.add(step({"input_ids": ids, "labels": ids})["loss"])
    assert len(losses) == 6, "the same batch twice must meet two noises"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "recompiled"


def test_a_saved_program_keeps_it(tmp_path):
    program = gt.capture(tiny_model("llama")).apply(NEFTune())
    loaded = gt.Program.load(program.save(tmp_path / "model.gt"))
    ids = random_ids(2, 9)
    torch.manual_seed(1)
    expected = program(ids)
    torch.manual_seed(1)
    assert torch.equal(loaded(ids), expected)
    assert loaded.ledger[-1].badge == "neftune α5"


def test_refusals():
    with pytest.raises(gt.UserError, match="alpha=0"):
        NEFTune(alpha=0)
    program = gt.capture(tiny_model("llama")).apply(NEFTune())
    with pytest.raises(gt.UserError, match="cannot follow 'neftune'"):
        program.apply(NEFTune())
