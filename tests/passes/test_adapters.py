"""Several adapters on one program add up, can be switched, and are PEFT's."""

import copy

import peft
import pytest
import torch

import graphtune as gt
from graphtune.passes import DoRA, Freeze, Full, LoRA, Merge, SetAdapter, Unmerge
from tests.oracles.models import assert_same_tensors, random_ids, tiny_model
from tests.oracles.peft import assert_bitwise, logits, peft_model, same_start

IDS = random_ids(2, 9)


def two_adapters(second=LoRA, **options):
    """A program with adapters a and b that overlap, and PEFT's of the same values."""
    model = tiny_model("qwen2")
    program = (
        gt.capture(model)
        .apply(LoRA(rank=4, alpha=8, targets=["q_proj", "v_proj"], adapter="a"))
        .apply(second(rank=2, alpha=6, targets=["v_proj", "down_proj"], adapter="b"))
    )
    reference = peft_model(model, adapter="a", target_modules=["q_proj", "v_proj"])
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )
    reference.add_adapter("b", config)
    reference.base_model.set_adapter(["a", "b"])
    same_start(reference, program)
    return model, program, reference


@pytest.mark.parametrize(("second", "options"), [(LoRA, {}), (DoRA, {"use_dora": True})])
def test_adapters_add_up_and_switch_as_in_peft(second, options):
    model, program, reference = two_adapters(second, **options)
    assert_bitwise(program, reference)
    switched = program
    for active in (["a"], ["b"], ["b", "a"], ["a", "b"]):
        reference.base_model.set_adapter(active)
        switched = switched.apply(SetAdapter(active))
        assert_bitwise(switched, reference)
    assert len(switched.graph.nodes) == len(program.graph.nodes)
    base = gt.capture(model)
    assert torch.equal(program.apply(SetAdapter(()))(IDS), base(IDS))


def test_merging_two_adapters_is_pefts():
    _, program, reference = two_adapters()
    merged = program.apply(Merge())
    assert_same_tensors(merged.state_dict(), reference.merge_and_unload().state_dict())


def test_an_inactive_adapter_is_not_merged():
    _, program, _ = two_adapters()
    only = program.apply(SetAdapter("b"))
    merged = only.apply(Merge())
    torch.testing.assert_close(merged(IDS), only(IDS), atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in merged.state_dict())


def test_unmerge_is_exact():
    _, program, _ = two_adapters()
    merged = program.apply(Merge(keep=True))
    again = merged.apply(Unmerge())
    assert torch.equal(again(IDS), program(IDS))
    assert not any("lora" in name for name in merged.state_dict())
    with pytest.raises(gt.UserError, match="keep=True"):
        program.apply(Merge()).apply(Unmerge())


def test_a_merged_program_can_be_adapted_again():
    _, program, _ = two_adapters()
    again = program.apply(Merge()).apply(LoRA(rank=2, targets=["q_proj"], adapter="a"))
    with torch.no_grad():
        for parameter in again.trainable_parameters():
            parameter.add_(0.1)
    merged = again.apply(Merge())
    torch.testing.assert_close(merged(IDS), again(IDS), atol=1e-4, rtol=1e-4)


def test_modules_to_save_switch_and_merge():
    model = tiny_model("llama")
    base = gt.capture(model)
    program = base.apply(
        LoRA(rank=4, targets=["q_proj"], modules_to_save=["model.norm"], adapter="a")
    )
    with torch.no_grad():
        for parameter in program.trainable_parameters():
            parameter.add_(0.1)
    assert not torch.equal(program(IDS), base(IDS))
    off = program.apply(SetAdapter(()))
    assert torch.equal(off(IDS), base(IDS))
    assert torch.equal(off.apply(SetAdapter("a"))(IDS), program(IDS))
    merged = program.apply(Merge())
    torch.testing.assert_close(merged(IDS), program(IDS), atol=1e-4, rtol=1e-4)
    with pytest.raises(gt.UserError, match="trained by adapter 'a' already"):
        program.apply(LoRA(targets=["v_proj"], modules_to_save=["model.norm"], adapter="b"))


def test_a_module_with_tied_weights_is_saved_apart():
    model = tiny_model("llama")
    program = gt.capture(model).apply(LoRA(targets=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        program.get_parameter("lm_head.modules_to_save.default.weight").mul_(2)
    untied = copy.deepcopy(model)
    untied.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    assert torch.equal(program(IDS), logits(untied, IDS))


def test_unknown_adapter_is_refused():
    _, program, _ = two_adapters()
    with pytest.raises(gt.UserError, match="no adapter 'c'; there are: a, b"):
        program.apply(SetAdapter("c"))


def trains(program):
    return {name for name, p in program.named_parameters() if p.requires_grad}


def test_full_and_freeze_choose_what_trains():
    base = gt.capture(tiny_model("qwen2"))
    names = set(dict(base.named_parameters()))
    assert trains(base.apply(Full())) == names
    norms = {name for name in names if "norm" in name}
    assert trains(base.apply(Full(targets=["*norm.weight", "*layernorm"]))) == norms
    last = {name for name in names if ".layers.1." in name}
    assert trains(base.apply(Full(layers=[1]))) == last
    assert trains(base.apply(Freeze(layers=["1..1"]))) == names - last
    assert trains(base.apply(Full(), Freeze(targets=["embed_tokens"]))) == {
        name for name in names if "embed_tokens" not in name
    }
    with pytest.raises(gt.UserError, match="passes.full.targets.*nrom"):
        base.apply(Full(targets=["nrom"]))


def test_full_beside_lora_in_any_order():
    base = gt.capture(tiny_model("qwen2"))
    lora, full = LoRA(rank=2), Full(targets=["model.norm"])
    expected = trains(base.apply(lora)) | {"model.norm.weight"}
    for passes in ([lora, full], [full, lora]):
        assert trains(base.apply(*passes)) == expected
        assert trains(base.apply(passes[0]).apply(passes[1])) == expected
