"""LoRA computes what PEFT computes, bit for bit, and its adapters are PEFT's."""

import functools

import pytest
import torch

import graphtune as gt
from graphtune.losses import cross_entropy
from graphtune.passes import DoRA, LoRA, Merge
from tests.oracles.models import (
    FAMILIES,
    MIXTURES,
    assert_same_tensors,
    random_ids,
    tiny_gpt2,
    tiny_model,
)
from tests.oracles.peft import assert_bitwise, logits, peft_model, same_start, trainable

EMBEDDINGS = ["embed_tokens", "o_proj"]
ATTENTION = ["q_proj", "v_proj", "o_proj"]
KINDS = [(LoRA, {}), (DoRA, {"use_dora": True})]
DENSE = sorted(set(FAMILIES) - set(MIXTURES))


TECHNIQUES = {
    "lora": (LoRA, {}, {}),
    "rslora": (LoRA, {"rslora": True}, {"use_rslora": True}),
    "dora": (DoRA, {}, {"use_dora": True}),
    "pissa": (LoRA, {"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "embedding": (LoRA, {"targets": EMBEDDINGS}, {"target_modules": EMBEDDINGS}),
}


@functools.cache
def captured(family):
    """Shared by tests that do not train the base."""
    model = tiny_gpt2() if family == "gpt2" else tiny_model(family)
    return model, gt.capture(model)


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("family", [*DENSE, "gpt2", *MIXTURES])
def test_every_technique_is_pefts_on_every_family(family, technique):
    """Logits, gradients and merged weights, bit for bit."""
    kind, ours, theirs = TECHNIQUES[technique]
    if family == "gpt2" and technique == "embedding":
        ours, theirs = {"targets": ["wte"]}, {"target_modules": ["wte"]}
    if family in MIXTURES and technique != "embedding":  # experts: see test_experts.py
        ours, theirs = ours | {"targets": ATTENTION}, theirs | {"target_modules": ATTENTION}
    model, base = captured(family)
    program = base.apply(kind(rank=4, alpha=8, **ours))
    conv1d = family == "gpt2" and technique != "embedding"
    reference = peft_model(model, **theirs, fan_in_fan_out=conv1d)
    same_start(reference, program)
    assert_bitwise(program, reference)
    merged = program.apply(Merge())
    ids = random_ids(3, 12)
    torch.testing.assert_close(merged(ids), program(ids), atol=1e-4, rtol=1e-4)
    expected = reference.merge_and_unload().state_dict()
    if technique == "embedding":  # PEFT merges into the tied head too, which was not adapted
        expected["lm_head.weight"] = merged.state_dict()["lm_head.weight"]
    assert_same_tensors(merged.state_dict(), expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rslora": True}, {"use_rslora": True}),
        ({"targets": ["q_proj", "*.v_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"targets": "re:.*layers.1.*proj"}, {"target_modules": r".*layers.1.*proj"}),
        ({"layers": [1]}, {"target_modules": r".*layers.1.*proj"}),
        ({"alpha": 3}, {"lora_alpha": 3}),
        ({"targets": ["lm_head", "q_proj"]}, {"target_modules": ["lm_head", "q_proj"]}),
        ({"targets": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}),
        (
            {"targets": [{"sites": "q_proj", "layers": ["1..1"], "rank": 2, "alpha": 3}, "v_proj"]},
            {
                "target_modules": r".*(layers.1.*q_proj|v_proj)",
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"q_proj": 3},
            },
        ),
        (
            {"targets": [{"sites": ["k_proj", "o_proj"], "skip": True}, "re:.*self_attn.*"]},
            {"target_modules": ["q_proj", "v_proj"]},
        ),
        ({"targets": ["q_proj"], "bias": "all"}, {"target_modules": ["q_proj"], "bias": "all"}),
        (
            {"targets": ["q_proj"], "bias": "lora_only"},
            {"target_modules": ["q_proj"], "bias": "lora_only"},
        ),
        (
            {"targets": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
        ),
    ],
)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_options_are_pefts(ours, theirs, kind, options):
    model, base = captured("qwen2")
    program = base.apply(kind(**{"rank": 4, "alpha": 8} | ours))
    reference = peft_model(model, **theirs | options)
    same_start(reference, program)
    assert_bitwise(program, reference)


@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
def test_embedding_dora_is_pefts(family):
    """Also where the embedding is scaled, as Gemma's is."""
    model, base = captured(family)
    program = base.apply(DoRA(rank=4, alpha=8, targets=EMBEDDINGS))
    reference = peft_model(model, target_modules=EMBEDDINGS, use_dora=True)
    same_start(reference, program)
    assert_bitwise(program, reference)
    ids = random_ids(2, 9)
    torch.testing.assert_close(program.apply(Merge())(ids), program(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_dropout_is_pefts(kind, options):
    model = tiny_model("llama")
    program = gt.capture(model).apply(kind(rank=4, alpha=8, dropout=0.3))
    reference = peft_model(model, lora_dropout=0.3, **options)
    same_start(reference, program)
    ids = random_ids(2, 9)
    torch.manual_seed(11)
    expected = logits(reference, ids)
    torch.manual_seed(11)
    assert torch.equal(program(ids), expected)
    assert torch.equal(program.eval()(ids), logits(reference.eval(), ids))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_half_precision_base_is_pefts(kind, options):
    model = tiny_model("qwen2").bfloat16()
    program = gt.capture(model).apply(kind(rank=4, alpha=8))
    assert {p.dtype for p in program.trainable_parameters()} == {torch.float32}
    reference = peft_model(model, **options)
    same_start(reference, program)
    assert_bitwise(program, reference, mask=True)


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        (LoRA, {}, {}),
        (LoRA, {"rslora": True}, {"use_rslora": True}),
        (DoRA, {}, {"use_dora": True}),
        (LoRA, {"init": "pissa"}, {"init_lora_weights": "pissa"}),
        (LoRA, {"targets": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}),
    ],
)
def test_ten_steps_of_adamw_are_pefts(kind, ours, theirs):
    model = tiny_model("qwen2")
    program = gt.capture(model).apply(kind(rank=4, alpha=8, **ours))
    reference = peft_model(model, **theirs)
    same_start(reference, program)
    parameters = trainable(reference)
    step = gt.compile_step(
        program, torch.optim.AdamW(program.trainable_parameters(), lr=1e-2), compile=False
    )
    optimizer = torch.optim.AdamW([parameters[n] for n in _trainable(program)], lr=1e-2)
    for seed in range(10):
        ids = random_ids(2, 9, seed)
        tokens = ids[:, 1:].numel()
        loss = cross_entropy(logits(reference, ids), ids) / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert step({"input_ids": ids, "labels": ids})["loss"] == loss.item()
    assert_same_tensors(_trainable(program), parameters)


def _trainable(program):
    return {name: p for name, p in program.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("transposed", [False, True])
def test_pissa_starts_where_peft_does(transposed):
    model = tiny_gpt2() if transposed else tiny_model("qwen2")
    program = gt.capture(model).apply(LoRA(rank=4, alpha=8, init="pissa"))
    reference = peft_model(model, init_lora_weights="pissa", fan_in_fan_out=transposed)
    theirs = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in reference.named_parameters()
    }
    assert_same_tensors(dict(program.named_parameters()), theirs)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "orthogonal"])
def test_other_starts_leave_the_model_as_it_is(init):
    model = tiny_model("qwen2")
    base = gt.capture(model)
    tuned = base.apply(LoRA(rank=4, init=init))
    ids = random_ids(2, 9)
    torch.testing.assert_close(tuned(ids), base(ids), atol=1e-4, rtol=1e-4)
    b = tuned.get_parameter("model.layers.0.self_attn.q_proj.lora_B.default.weight")
    assert b.abs().max() > 0
    assert torch.equal(base(ids), model(input_ids=ids, use_cache=False).logits)


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
    name = "model.layers.0.mlp.down_proj.lora_A.default.weight"
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
        ({"layers": [5]}, r"passes.lora.layers=\[5\].*layers 0..1"),
        ({"layers": ["3..1"]}, r"passes.lora.layers=.*such as \[8..15\]"),
        ({"targets": [{"sites": "q_proj", "rnk": 3}]}, "no option `rnk`.*did you mean `rank`"),
        ({"targets": [{"sites": "q_proj", "rank": "3"}]}, "`rank=3` must be of type int"),
        ({"targets": [{"rank": 3}]}, r"targets\[0\].sites"),
        ({"init": "pissa", "targets": ["embed_tokens"]}, "init=pissa.*embed_tokens"),
    ],
)
def test_what_cannot_be_applied_is_refused_before_and_after_capture(options, message):
    model = tiny_model("llama")
    with pytest.raises(gt.UserError, match=message):
        LoRA(**options).check(model)
    with pytest.raises(gt.UserError, match=message):
        gt.capture(model).apply(LoRA(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"dropout": 1.0},
        {"init": "zeros"},
        {"init": "kaiming_niter_3"},
        {"rank": 3, "init": "orthogonal"},
        {"bias": "some"},
        {"dtype": "float8"},
        {"adapter": "a.b"},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(gt.UserError, match=f"passes.lora.{next(iter(options))}"):
        LoRA(**options)


def test_two_adapters_of_one_name_are_refused():
    tuned = gt.capture(tiny_model("llama")).apply(LoRA(targets=["q_proj"]))
    for other in (LoRA(targets=["q_proj"]), DoRA(targets=["v_proj"])):
        with pytest.raises(gt.UserError, match="adapter=default.*another name"):
            tuned.apply(other)


def test_merge_without_adapter_is_refused():
    with pytest.raises(gt.UserError, match="no adapter"):
        gt.capture(tiny_model("llama")).apply(Merge())


def test_adapting_the_tied_head_does_not_leak_into_the_embedding():
    model = tiny_model("llama")
    base = gt.capture(model)
    tuned = base.apply(LoRA(rank=4, targets=["lm_head"]))
    with torch.no_grad():
        tuned.get_parameter("lm_head.lora_B.default.weight").fill_(0.1)
    ids = random_ids(2, 7)
    merged = tuned.apply(Merge())
    torch.testing.assert_close(merged(ids), tuned(ids), atol=1e-4, rtol=1e-4)
    parameters = merged.all_parameters()
    assert torch.equal(parameters["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert not torch.equal(parameters["lm_head.weight"], model.lm_head.weight)
