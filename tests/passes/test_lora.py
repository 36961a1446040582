"""LoRA computes what PEFT computes, bit for bit, and its adapters are PEFT's."""

import copy

import peft
import pytest
import torch

import graphtune as gt
from graphtune.export.peft import from_peft, to_peft
from graphtune.passes import LoRA, Merge
from tests.oracles.models import (
    FAMILIES,
    assert_same_tensors,
    gradients,
    random_ids,
    tiny_gpt2,
    tiny_model,
)


def peft_model(model, adapter=None, **options):
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config | options)).train()


def peft_tensors(model):
    """PEFT's adapter parameters under our names."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def same_adapter(model, program, seed=5):
    """Give both the same adapter, B not zero."""
    generator = torch.Generator().manual_seed(seed)
    theirs = peft_tensors(model)
    ours = {n: p for n, p in program.named_parameters() if "lora_" in n}
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            theirs[name].copy_(parameter)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_gradients_and_merged_weights_are_pefts(family):
    model = tiny_model(family)
    program = gt.capture(model).apply(LoRA(rank=4, alpha=8))
    reference = peft_model(model)
    same_adapter(reference, program)
    ids = random_ids(3, 12)
    found, expected = program(ids), reference(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, expected)
    theirs = {
        n.removeprefix("base_model.model.").replace(".default", ""): g
        for n, g in gradients(expected, reference).items()
    }
    assert_same_tensors(gradients(found, program), theirs)
    merged = program.apply(Merge())
    assert_same_tensors(merged.state_dict(), reference.merge_and_unload().state_dict())
    torch.testing.assert_close(merged(ids), found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rslora": True}, {"use_rslora": True}),
        ({"targets": ["q_proj", "*.v_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"targets": "re:.*layers.1.*proj"}, {"target_modules": r".*layers.1.*proj"}),
        ({"alpha": 3}, {"lora_alpha": 3}),
    ],
)
def test_options_are_pefts(ours, theirs):
    model = tiny_model("llama")
    program = gt.capture(model).apply(LoRA(**{"rank": 4, "alpha": 8} | ours))
    reference = peft_model(model, **theirs)
    same_adapter(reference, program)
    ids = random_ids(2, 9)
    assert torch.equal(program(ids), reference(input_ids=ids, use_cache=False).logits)


def test_dropout_is_pefts():
    model = tiny_model("llama")
    program = gt.capture(model).apply(LoRA(rank=4, alpha=8, dropout=0.3))
    reference = peft_model(model, lora_dropout=0.3)
    same_adapter(reference, program)
    ids = random_ids(2, 9)
    torch.manual_seed(11)
    expected = reference(input_ids=ids, use_cache=False).logits
    torch.manual_seed(11)
    assert torch.equal(program(ids), expected)
    assert torch.equal(program.eval()(ids), reference.eval()(input_ids=ids, use_cache=False).logits)


def test_conv1d_is_pefts():
    model = tiny_gpt2()
    program = gt.capture(model).apply(LoRA(rank=4, alpha=8))
    reference = peft_model(model, fan_in_fan_out=True)
    same_adapter(reference, program)
    ids = random_ids(2, 9)
    found = program(ids)
    assert torch.equal(found, reference(input_ids=ids, use_cache=False).logits)
    merged = program.apply(Merge())
    assert_same_tensors(merged.state_dict(), reference.merge_and_unload().state_dict())


def test_training_takes_pefts_steps():
    model = tiny_model("qwen2")
    program = gt.capture(model).apply(LoRA(rank=4, alpha=8))
    reference = peft_model(model)
    same_adapter(reference, program)
    theirs = peft_tensors(reference)
    step = gt.compile_step(
        program, torch.optim.AdamW(program.trainable_parameters(), lr=1e-2), compile=False
    )
    optimizer = torch.optim.AdamW(theirs.values(), lr=1e-2)
    for seed in range(5):
        ids = random_ids(2, 9, seed)
        loss = reference(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert step({"input_ids": ids, "labels": ids})["loss"] == pytest.approx(
            loss.item(), rel=1e-5
        )
    for name, parameter in theirs.items():
        torch.testing.assert_close(program.get_parameter(name), parameter, atol=1e-4, rtol=1e-3)


def test_adapter_goes_to_peft_and_back(tmp_path):
    model = tiny_model("llama")
    base = gt.capture(model)
    program = base.apply(LoRA(rank=4, alpha=8, rslora=True, targets=["q_proj", "down_proj"]))
    reference = peft_model(model, use_rslora=True, target_modules=["q_proj", "down_proj"])
    same_adapter(reference, program)
    ids = random_ids(2, 9)
    logits = program(ids)

    to_peft(program, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, logits)

    loaded.save_pretrained(tmp_path / "theirs")
    assert torch.equal(from_peft(base, tmp_path / "theirs")(ids), logits)


def test_adapter_for_another_base_is_refused(tmp_path):
    to_peft(gt.capture(tiny_model("llama")).apply(LoRA(rank=4)), tmp_path)
    with pytest.raises(gt.UserError, match="matches no site"):
        from_peft(gt.capture(tiny_model("phi3")), tmp_path)


def test_the_given_program_stays_and_tensors_are_shared():
    base = gt.capture(tiny_model("llama"))
    nodes, ids = len(base.graph.nodes), random_ids(2, 5)
    before = base(ids)
    tuned = base.apply(LoRA(rank=2))
    assert len(base.graph.nodes) == nodes
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == {
        n for n in tuned.state_dict() if ".lora_" in n
    }
    for name, parameter in base.named_parameters():
        assert tuned.get_parameter(name).data_ptr() == parameter.data_ptr()
    with torch.no_grad():
        for parameter in tuned.trainable_parameters():
            parameter.fill_(0.1)
    assert torch.equal(base(ids), before)
    merged = tuned.apply(Merge())
    assert torch.equal(base(ids), before)
    assert len(merged.graph.nodes) == nodes


def test_initial_a_has_the_documented_distribution():
    base = gt.capture(tiny_model("llama"))
    name = "model.layers.0.mlp.down_proj.lora_A.weight"
    torch.manual_seed(0)
    kaiming = base.apply(LoRA(rank=32, targets=["down_proj"])).get_parameter(name)
    bound = (1 / kaiming.shape[1]) ** 0.5  # kaiming uniform with a = sqrt(5)
    assert kaiming.abs().max() <= bound
    assert kaiming.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    gaussian = base.apply(LoRA(rank=32, targets=["down_proj"], init="gaussian")).get_parameter(name)
    assert gaussian.std().item() == pytest.approx(1 / 32, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["*.q_prj"]}, "passes.lora.targets.*q_prj.*nearest: q_proj"),
        ({"targets": ["q_proj", "nothing_at_all"]}, "nothing_at_all"),
        ({"targets": ["re:("]}, "regular expression"),
        ({"rank": 17}, r"passes.lora.rank=17.*k_proj.*at most 16"),
    ],
)
def test_what_cannot_be_applied_is_refused_before_and_after_capture(options, message):
    model = tiny_model("llama")
    with pytest.raises(gt.UserError, match=message):
        LoRA(**options).check(model)
    with pytest.raises(gt.UserError, match=message):
        gt.capture(model).apply(LoRA(**options))


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 1.0}, {"init": "zeros"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(gt.UserError, match=f"passes.lora.{next(iter(options))}"):
        LoRA(**options)


def test_two_loras_are_refused():
    tuned = gt.capture(tiny_model("llama")).apply(LoRA())
    with pytest.raises(gt.UserError, match="passes.lora.*cannot follow"):
        tuned.apply(LoRA())


def test_merge_without_adapter_is_refused():
    with pytest.raises(gt.UserError, match="no adapter"):
        gt.capture(tiny_model("llama")).apply(Merge())


def test_adapting_the_tied_head_does_not_leak_into_the_embedding():
    model = tiny_model("llama")
    base = gt.capture(model)
    tuned = base.apply(LoRA(rank=4, targets=["lm_head"]))
    with torch.no_grad():
        tuned.get_parameter("lm_head.lora_B.weight").fill_(0.1)
    ids = random_ids(2, 7)
    merged = tuned.apply(Merge())
    torch.testing.assert_close(merged(ids), tuned(ids), atol=1e-4, rtol=1e-4)
    parameters = merged.all_parameters()
    assert torch.equal(parameters["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert not torch.equal(parameters["lm_head.weight"], model.lm_head.weight)
