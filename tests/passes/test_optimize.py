"""Optimizing passes change how a step is computed, and nothing that it computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import graphtune as gt
from graphtune.masks import causal_mask
from graphtune.passes import (
    ActivationCheckpoint,
    CausalAttention,
    DoRA,
    Full,
    FuseAdapters,
    LoRA,
    Merge,
    Quantize,
    optimized,
)
from graphtune.program import Program
from tests.oracles.models import FAMILIES, gradients, random_ids, tiny_gpt2, tiny_model
from tests.oracles.peft import logits, peft_model, same_start, trainable

METHODS = {
    "lora": (LoRA(rank=4, alpha=7),),  # a scaling that is no power of two
    "dora": (DoRA(rank=4, alpha=7),),
    "qlora": (Quantize(format="int8"), LoRA(rank=4, alpha=7)),
    "dropout": (LoRA(rank=4, alpha=7, dropout=0.2),),
    "several": (LoRA(rank=2, alpha=3), LoRA(rank=4, targets=["q_proj", "k_proj"], adapter="b")),
    "half": (LoRA(rank=4, layers=(1,)),),
}


@pytest.fixture(scope="module")
def llama():
    return gt.capture(tiny_model("llama"))


def shaken(program, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in program.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return program


def assert_close(found, expected, tolerance=1e-5):
    """By name; each tensor relative to its own size."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        off = float((found[name] - tensor).norm() / tensor.norm().clamp(min=1e-9))
        assert off <= tolerance, f"{name} differs by {off:.2g}"


def batch(length=16, **more):
    ids = random_ids(2, length)
    return {"input_ids": ids, "labels": ids, **more}


def step_gradients(program, data, seed=1):
    """Gradients of an uncompiled step, by name."""
    optimizer = torch.optim.SGD(program.trainable_parameters(), lr=0.1)
    step = gt.compile_step(program, optimizer, compile=False)
    names = [name for name, p in program.named_parameters() if p.requires_grad]
    torch.manual_seed(seed)
    found = torch.autograd.grad(step.loss_sum(data), step.parameters)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_models_are_trained_as_transformers_does_it(family):
    model = tiny_gpt2() if family == "gpt2" else tiny_model(family)
    program = optimized(gt.capture(model).apply(Full()))
    ids = random_ids(3, 12)
    mask = causal_mask(ids, None)
    expected = model(ids, use_cache=False).logits
    theirs = gradients(expected, model)
    for given in (None, mask):
        found = program(ids, given)
        assert_close({"logits": found}, {"logits": expected})
        assert_close(gradients(found, program), theirs, 1e-4)


# Where experts are linears of their own modules, PEFT has other targets (see test_experts).
@pytest.mark.parametrize("family", [f for f in FAMILIES if "moe" not in f and f != "mixtral"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_are_trained_as_peft_does_it(family, dora):
    model = tiny_model(family)
    reference = peft_model(model, lora_alpha=7, use_dora=dora)
    program = gt.capture(model).apply((DoRA if dora else LoRA)(rank=4, alpha=7))
    same_start(reference, program)
    fused = optimized(program)
    ids = random_ids(3, 12)
    found, expected = fused(ids), logits(reference, ids)
    assert_close({"logits": found}, {"logits": expected})
    names = {id(p): name for name, p in trainable(reference).items()}
    by_peft = gradients(expected, reference)
    theirs = {names[id(p)]: by_peft[n] for n, p in reference.named_parameters() if n in by_peft}
    assert_close(gradients(found, fused), theirs, 1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["none", "full", "selective", "budget"])
def test_what_is_saved_and_recomputed_stays_the_same(llama, method, mode):
    budget = 0.5 if mode == "budget" else None
    program = shaken(llama.apply(*METHODS[method]))
    tagged = program.apply(ActivationCheckpoint(mode=mode, budget=budget))
    data = batch()
    expected = step_gradients(program, data)
    assert_close(step_gradients(optimized(tagged), data), expected, 1e-4)
    masked = data | {"attention_mask": causal_mask(data["input_ids"], None)}
    assert_close(step_gradients(optimized(tagged), masked), expected, 1e-4)


def test_new_nodes_have_the_tags_of_those_they_replace(llama):
    tagged = llama.apply(LoRA(rank=4), ActivationCheckpoint("selective"))
    for node in optimized(tagged).graph.nodes:
        inside = ".layers." in str(node.meta.get("nn_module_stack", ""))
        if node.op == "call_function" and inside and "sym_size" not in node.name:
            assert "recompute" in node.meta, node.name


def test_tensors_are_those_of_the_given_program(llama):
    program = shaken(llama.apply(LoRA(rank=4, alpha=7)))
    fused = optimized(program)
    assert fused.state_dict().keys() == program.state_dict().keys()
    ours, theirs = fused.all_parameters(), program.all_parameters()
    assert all(ours[name] is parameter for name, parameter in theirs.items())
    optimizer = torch.optim.SGD(fused.trainable_parameters(), lr=0.01)
    gt.compile_step(fused, optimizer, compile=False)(batch())
    ids = random_ids(2, 9)
    assert_close({"": program(ids)}, {"": fused(ids)})
    assert_close({"": program.apply(Merge())(ids)}, {"": fused(ids)}, 1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "several"])
def test_an_optimized_program_merges_and_saves(llama, method, tmp_path):
    fused = optimized(shaken(llama.apply(*METHODS[method])))
    ids = random_ids(2, 9)
    expected = fused(ids)
    loaded = Program.load(fused.save(tmp_path / "model.gt"))
    assert torch.equal(loaded(ids, causal_mask(ids, None)), fused(ids, causal_mask(ids, None)))
    merged = fused.apply(Merge(dequantize=True))
    assert not any("lora_" in name for name in merged.state_dict())
    assert_close({"": merged(ids)}, {"": expected}, 1e-4)


def test_a_second_time_changes_nothing(llama):
    fused = optimized(llama.apply(LoRA(rank=4)))
    assert len(optimized(fused).ledger) == len(fused.ledger)
    with pytest.raises(gt.errors.UserError, match="cannot follow"):
        fused.apply(FuseAdapters())


def test_a_compiled_step_has_the_same_gradients(llama):
    program = shaken(llama.apply(LoRA(rank=4, alpha=7)))
    fused = optimized(program)
    step = gt.compile_step(fused, torch.optim.SGD(fused.trainable_parameters(), lr=0.1))
    expected = list(step_gradients(program, batch()).values())
    found = torch.autograd.grad(step.loss_sum(batch()), step.parameters)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("layers", [None, (1,)], ids=["all", "upper"])
def test_a_step_does_no_more_work_than_lora_needs(llama, fuse, layers):
    """4 FLOP for each frozen weight and token, 2 below the lowest adapter; 6 for each adapter's."""
    rank, shapes = 4, {n: p.shape for n, p in llama.named_parameters() if p.dim() == 2}
    program = shaken(llama.apply(LoRA(rank=rank, layers=layers)))
    program = optimized(program) if fuse else program
    tokens, lowest = 2 * 16, 0 if layers is None else 1
    expected = 4 * shapes["model.embed_tokens.weight"].numel()  # the head, which is tied to it
    for name, shape in shapes.items():
        if ".layers." not in name:
            continue
        # Nothing that trains is before the lowest layer's first linears: their input needs none.
        first = any(part in name for part in ("q_proj", "k_proj", "v_proj"))
        adapted = layers is None or ".layers.1." in name
        backward = adapted and not (first and f".layers.{lowest}." in name)
        expected += (2 + 2 * backward) * shape.numel()
        if adapted:
            expected += 6 * rank * sum(shape) - (0 if backward else 2 * rank * shape[1])
    with FlopCounterMode(display=False) as counter:
        step_gradients(program, batch())
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts["aten.mm"] == expected * tokens


def test_later_passes_drop_the_graph_without_a_mask(llama):
    program = llama.apply(CausalAttention())
    assert program.unmasked is not None
    after = program.apply(LoRA(rank=4))
    assert after.unmasked is None
    ids = random_ids(2, 9)
    assert torch.allclose(after(ids), program(ids), atol=1e-5)
