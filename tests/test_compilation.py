"""A step that is compiled layer by layer is the step that is compiled whole, and starts sooner."""

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, LlamaConfig

import graphtune as gt
from graphtune.compilation import Compiled
from graphtune.config import validate
from graphtune.losses import cross_entropy, loss_sum, with_rows
from graphtune.passes import ActivationCheckpoint, FusedLoss, LoRA, Quantize, SharedMask
from graphtune.recomputation import as_tagged
from tests.oracles.models import VOCAB, random_ids, tiny_gpt2, tiny_model
from tests.oracles.saved import saved_tensors


def llama(layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return gt.capture(AutoModelForCausalLM.from_config(config).train())


def batch(rows, length, seed=0):
    ids = random_ids(rows, length, seed)
    return {"input_ids": ids, "labels": ids}


def make_step(program, compile="layers"):
    optimizer = torch.optim.SGD(program.trainable_parameters(), lr=0.1)
    return gt.compile_step(program, optimizer, compile=compile)


@pytest.mark.slow  # two compilations by the C++ compiler
def test_layers_and_whole_agree_when_lowered():
    torch._dynamo.reset()
    program = tiny_model("llama")
    step = make_step(gt.capture(program).apply(LoRA(rank=2)))
    assert step.check(batch(3, 11)) < 1e-5
    before = step.compilations
    for rows, length in ((3, 11), (2, 17), (5, 9)):
        data = batch(rows, length, seed=length)
        expected = program(**data, use_cache=False).loss.item()
        assert step.loss_sum(data).item() / (rows * (length - 1)) == pytest.approx(expected, 1e-5)
    assert step.compilations == before, "recompiled"


def test_graphs_do_not_grow_with_depth_or_shapes(not_lowered):
    for layers in (3, 7):
        step = make_step(llama(layers).apply(LoRA(rank=2)))
        assert step.compilations == 0
        for rows, length in ((2, 8), (3, 8), (3, 13), (2, 21)):
            step(batch(rows, length))
        assert step.compilations == 3  # the first layer, the others, head and loss
        step(batch(1, 8))  # a size of 1 is a constant
        assert step.compilations == 6
        step(batch(1, 17))
        assert step.compilations == 6


def test_a_whole_step_takes_all_shapes_too(not_lowered):
    step = make_step(llama(2), compile="whole")
    mask = torch.ones(3, 1, 13, 13, dtype=torch.bool).tril()
    for rows, length in ((2, 8), (3, 13), (2, 21)):
        step(batch(rows, length))
    assert step.compilations == 1
    step({**batch(3, 13), "attention_mask": mask})
    assert step.compilations == 2


@pytest.mark.slow
def test_a_process_may_have_many_steps(not_lowered):
    """More than torch compiles of one code by default."""
    program = llama(1)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        step = make_step(program.apply(LoRA(rank=2)), compile="whole")
        step.loss_sum(batch(2, 8))
        assert step.compilations == 1


def test_it_is_chosen_by_how_many_layers_are_spared():
    def how(program, **options):
        return make_step(program, **options)._compiled.how

    assert how(llama(2), compile="auto") == how(llama(3), compile=True) == "whole"
    assert how(llama(4), compile="auto") == how(llama(4), compile=True) == "layers"
    assert how(llama(4), compile="whole") == "whole"
    assert how(llama(2), compile="layers") == "layers"
    ranks = tuple({"sites": f"re:.*layers.{i}.*", "rank": i + 1} for i in range(4))
    assert how(llama(4).apply(LoRA(targets=ranks)), compile="auto") == "whole"  # all differ


def test_a_wrong_choice_is_refused():
    with pytest.raises(gt.UserError, match="compile=fast"):
        make_step(llama(1), compile="fast")


def test_configs_take_the_same_choices():
    config = {
        "output_dir": "runs/x",
        "model": {"id": "some/model"},
        "dataset": {"_component_": "datetime.timedelta", "days": 1},
    }
    for good in ("auto", "whole", "layers", True, False):
        assert validate(OmegaConf.create({**config, "compile": good})).compile == good
    with pytest.raises(gt.UserError, match="compile"):
        validate(OmegaConf.create({**config, "compile": "fast"}))


METHODS = {
    "full": [ActivationCheckpoint("full")],
    "selective": [LoRA(rank=2), ActivationCheckpoint("selective")],
    "qlora": [Quantize(format="int8"), LoRA(rank=2), ActivationCheckpoint("full")],
    "qlora, nothing again": [Quantize(format="int8"), LoRA(rank=2)],
}


SLOW = ("full", "qlora", "qlora, nothing again")


@pytest.mark.parametrize(
    "method",
    [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in METHODS],
)
def test_layers_save_what_the_whole_saves(method, not_lowered):
    program, data = llama(4).apply(*METHODS[method], SharedMask()), batch(2, 16)
    own = (*program.parameters(), *program.buffers(), *data.values())
    found = []
    for compile in ("whole", "layers"):
        step = make_step(program, compile=compile)
        with as_tagged(program):
            loss, saved = saved_tensors(lambda step=step: step.loss_sum(data), own)
        size = sum(tensor.untyped_storage().nbytes() for tensor in saved)
        found.append((size, torch.autograd.grad(loss, step.parameters)))
    (whole, expected), (layers, gradients) = found
    one_mask = 2 * 16 * 16 * 4  # (batch, 1, seq, seq) floats, which the whole may compute again
    assert layers <= 1.02 * whole + one_mask
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_layers_that_share_a_region_drop_different_numbers(not_lowered):
    """Were their random numbers the same, so would be what equal layers do to equal inputs."""
    program = gt.capture(tiny_gpt2(dropout=0.5))
    step = make_step(program)
    region = step._compiled.outline.graph_module.region_0
    drawn = []
    inner = region.forward

    def twice(*inputs):
        drawn.append([inner(*inputs)[0] for _ in range(2)])
        return (drawn[-1][0],)

    region.forward = twice
    step.loss_sum(batch(2, 8))
    assert len(drawn) == 2
    for first, second in drawn:
        assert not torch.equal(first, second)
    program.eval()
    drawn.clear()
    step.loss_sum(batch(2, 8))
    for first, second in drawn:
        assert torch.equal(first, second)


def test_a_loss_in_the_graph_is_part_of_its_end(not_lowered):
    """FusedLoss is compiled with the head, once for any number of labels."""
    program = llama(4)
    compiled = Compiled(program.apply(FusedLoss(chunks=2)), cross_entropy, "layers")
    for length, masked in ((8, 2), (11, 7)):
        ids = random_ids(2, length)
        data = {"input_ids": ids, "labels": ids.clone()}
        data["labels"][:, :masked] = -100
        expected = loss_sum(program, data)
        found = compiled(with_rows(program.apply(FusedLoss(chunks=2)), data))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert compiled.graphs == 2
