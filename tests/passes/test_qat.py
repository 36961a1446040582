"""Fake quantization: torchao's eager QAT, in every bit and every gradient."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer, QATConfig
from torchao.quantization.qat.embedding import FakeQuantizedEmbedding
from torchao.quantization.quant_primitives import _fake_quantize_affine

import graphtune as gt
from graphtune.errors import UserError
from graphtune.fake_quantization import (
    fake_quantize_tensor,
    fake_quantize_tokens,
    fake_quantize_weight,
    static_qparams,
)
from graphtune.passes import QAT, DoRA, LoRA, Merge, Quantize
from graphtune.passes.qat import SCHEMES, at_step, observe, ranges
from tests.oracles.by_hand import put_in
from tests.oracles.models import (
    VOCAB,
    assert_same_tensors,
    gradients,
    random_ids,
    tiny_gpt2,
    tiny_model,
)
from tests.oracles.packed import masked, packed
from tests.passes.test_composition import shake

IDS = random_ids(2, 9)
BATCH = {"input_ids": IDS, "labels": IDS}
TOKENS = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False, scale_precision=None)


@functools.cache
def captured(family):
    """A model, and the program of it; tests change neither."""
    model = tiny_model(family)
    return model, gt.capture(model)


def weight_config(bits, group):
    dtype = getattr(torch, f"int{bits}")
    return IntxFakeQuantizeConfig(dtype, group_size=group, scale_precision=None)


def torchao_config(scheme, group):
    """torchao's configuration that has the same name in the world."""
    bits, activation = SCHEMES[scheme]
    dtype = getattr(torch, f"int{bits}")
    granularity = PerGroup(group) if group else PerAxis(0)
    if activation is None:
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)


def torchaos(model, scheme, group, filter_fn=None):
    def inner(module, name):
        return isinstance(module, nn.Linear) and "lm_head" not in name

    reference = copy.deepcopy(model)
    config = QATConfig(torchao_config(scheme, group), step="prepare")
    quantize_(reference, config, filter_fn or inner)
    return reference


def compare(program, reference, ids=IDS):
    found, expected = program(ids), reference(input_ids=ids, use_cache=False).logits
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected), (found - expected).abs().max()
    ours, theirs = gradients(found, program), gradients(expected, reference)
    assert_same_tensors({n: ours[n] for n in theirs}, theirs)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 7),
    groups=st.integers(1, 5),
    group=st.sampled_from([2, 16, 32]),
    bits=st.sampled_from([2, 4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_operators_are_torchaos(rows, groups, group, bits, dtype, size, seed):
    torch.manual_seed(seed)
    values = (torch.randn(rows, groups * group) * size + torch.rand(()) * size).to(dtype)
    values[0, :group] = 0  # a group without a range
    up = torch.randn(values.shape).to(dtype)
    theirs = [IntxFakeQuantizer(weight_config(bits, group)), IntxFakeQuantizer(TOKENS)]
    ours = [lambda x: fake_quantize_weight(x, -1, group, bits, False), fake_quantize_tokens]
    for their, our in zip(theirs, ours, strict=True):
        a, b = values.clone().requires_grad_(), values.clone().requires_grad_()
        expected, found = their(a), our(b)
        assert torch.equal(found, expected) and found.dtype == dtype
        expected.backward(up)
        found.backward(up)
        assert torch.equal(b.grad, a.grad)
    turned = fake_quantize_weight(values.T.contiguous(), -2, group, bits, False)
    assert torch.equal(turned.T, IntxFakeQuantizer(weight_config(bits, group))(values))


@pytest.mark.parametrize("scheme", ["8da4w", "8da8w", "int4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_logits_and_gradients_are_torchaos(family, scheme):
    model, base = captured(family)
    group = 16 if SCHEMES[scheme].bits == 4 else None
    program = base.apply(QAT(scheme=scheme, group_size=group, scale_dtype="weight"))
    assert len(program.ledger[-1].sites) == 14
    reference = torchaos(model, scheme, group)
    compare(program, reference)
    compare(program, reference, random_ids(3, 5, seed=2))
    plain = model(input_ids=IDS, use_cache=False).logits
    assert not torch.allclose(program(IDS), plain, atol=1e-3)


def test_scales_of_8da4w_are_bfloat16():
    model, base = captured("llama")
    program = base.apply(QAT(group_size=16))
    reference = torchaos(model, "8da4w", 16)
    for module in reference.modules():
        if hasattr(module, "weight_fake_quantizer"):
            module.weight_fake_quantizer.config.scale_precision = torch.bfloat16
    compare(program, reference)


class WithTorchaos(fx.Interpreter):
    """Runs a program with torchao's fake quantizers in the place of our operators."""

    def call_function(self, target, args, kwargs):
        if target is fake_quantize_weight:
            return IntxFakeQuantizer(weight_config(args[3], args[2]))(args[0])
        if target is fake_quantize_tokens:
            return IntxFakeQuantizer(TOKENS)(args[0])
        return super().call_function(target, args, kwargs)


def test_in_bfloat16():
    """Capture alone adds up some gradients of bfloat16 in another order than transformers."""
    model = tiny_model("llama").to(torch.bfloat16)
    program = gt.capture(model).apply(QAT(scale_dtype="weight", group_size=16))
    reference = copy.copy(program)
    object.__setattr__(reference, "graph_module", WithTorchaos(program.graph_module).run)
    found, expected = program(IDS), reference(IDS)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert_same_tensors(gradients(found, program), gradients(expected, program))
    eager = torchaos(model, "8da4w", 16)
    assert torch.equal(found, eager(input_ids=IDS, use_cache=False).logits)


def test_rules_mix_bits_and_embeddings():
    model, base = captured("qwen2")
    program = base.apply(
        QAT(
            targets=[
                {"sites": "*.down_proj", "scheme": "8da8w", "group_size": 0},
                {"sites": "*embed_tokens", "scheme": "int4", "group_size": 8},
                {"sites": "*.layers.0.*o_proj", "skip": True},
                {"sites": "lm_head", "scheme": "int8"},
                "all-linear",
            ],
            group_size=16,
            scale_dtype="weight",
        )
    )

    def where(*ends):
        return lambda module, name: isinstance(module, nn.Linear) and name.endswith(ends)

    others = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "layers.1.self_attn.o_proj")
    reference = torchaos(model, "8da8w", None, where("down_proj"))
    reference = torchaos(reference, "8da4w", 16, where(*others))
    reference = torchaos(reference, "int8", 16, where("lm_head"))
    table = FakeQuantizedEmbedding.from_embedding(model.model.embed_tokens, weight_config(4, 8))
    reference.model.embed_tokens = copy.deepcopy(table)
    compare(program, reference)


class Rounded(nn.Module):
    """QAT-LoRA as one would write it with torchao's fake quantizers."""

    def __init__(self, linear, a, b, scaling, effective):
        super().__init__()
        self.linear, self.a, self.b = linear, a, b
        self.scaling, self.effective = scaling, effective
        self.tokens = IntxFakeQuantizer(TOKENS)
        self.rounded = IntxFakeQuantizer(weight_config(4, 16))

    def forward(self, x):
        weight = self.linear.weight
        if self.effective:
            weight = weight + self.b @ self.a * self.scaling
        out = nn.functional.linear(self.tokens(x), self.rounded(weight), self.linear.bias)
        return out if self.effective else out + self.scaling * (x @ self.a.T @ self.b.T)


@pytest.mark.parametrize("weights", ["effective", "base"])
def test_qat_lora(weights):
    model, base = captured("qwen2")
    program = base.apply(
        QAT(scale_dtype="weight", group_size=16, weights=weights),
        LoRA(rank=4, alpha=8, targets=["q_proj", "down_proj"]),
    )
    shake(program)
    reference = torchaos(model, "8da4w", 16).requires_grad_(False)
    factors = {}
    for name in program.ledger[-2].sites:
        names = [f"{name}.lora_{m}.default.weight" for m in "AB"]
        a, b = (nn.Parameter(program.get_parameter(n).detach().clone()) for n in names)
        factors |= dict(zip(names, (a, b), strict=True))
        linear = copy.deepcopy(model.get_submodule(name)).requires_grad_(False)
        put_in(reference, name, Rounded(linear, a, b, 2.0, weights == "effective"))
    found, expected = program(IDS), reference(input_ids=IDS, use_cache=False).logits
    ours = gradients(found, program)
    theirs = gradients(expected, reference)
    assert set(ours) == set(factors)
    theirs = {n: theirs[f"{n.split('.lora_')[0]}.{n.split('.lora_')[1][0].lower()}"] for n in ours}
    if weights == "effective":
        assert torch.equal(found, expected)
        assert_same_tensors(ours, theirs)
        merged = program.apply(Merge())
        assert torch.equal(merged(IDS), found)  # what is trained is what is merged
        assert not any("lora" in name for name in merged.state_dict())
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for name, gradient in theirs.items():
            assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("make", [tiny_gpt2, lambda: tiny_model("mixtral")])
def test_other_layouts(make):
    """Conv1D has its weights transposed, experts have three dimensions; the last also LoRA."""
    base = gt.capture(make())
    tuned = base.apply(LoRA(rank=2), QAT(group_size=8, scale_dtype="weight"))
    shake(tuned)
    assert torch.equal(tuned.apply(Merge())(IDS), tuned(IDS))
    weight = dict(base.named_parameters())[f"{tuned.ledger[-1].sites[0]}.weight"]
    node = next(
        n
        for n in base.apply(QAT(group_size=8, scale_dtype="weight")).graph.nodes
        if "weight" in str(n.target) and n.target is fake_quantize_weight
    )
    quantizer = IntxFakeQuantizer(weight_config(4, 8))
    expected = quantizer(weight.T).T if node.args[1] == -2 else quantizer(weight)
    assert torch.equal(fake_quantize_weight(weight, *node.args[1:5]), expected)


def test_static_ranges_are_observed_and_frozen():
    model, base = captured("llama")
    program = base.apply(QAT(scheme="int8_static"))
    weights_alone = base.apply(QAT(scheme="int8"))
    assert torch.equal(program(IDS), weights_alone(IDS))  # nothing observed yet
    seen = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    batches = [{"input_ids": random_ids(2, 7, seed)} for seed in (3, 4)]
    for step, batch in enumerate(batches):
        model(input_ids=batch["input_ids"], use_cache=False)
        at_step(program, step, [batch])
    hook.remove()
    every = torch.cat(seen)
    name = "model.layers.0.self_attn.q_proj_observed_input"
    found = program.get_buffer(name)
    assert torch.equal(found, torch.stack([every.min(), every.max()]))
    at_step(program, 16, [{"input_ids": random_ids(2, 7, 5)}])  # beyond `observe_steps`
    assert torch.equal(program.get_buffer(name), found)
    # The operator is torchao's with one block, and its gradient too.
    scale, zero_point = static_qparams(found)
    x = (every * 1.5).requires_grad_()  # some of it is clipped
    expected = _fake_quantize_affine(x, x.shape, scale, zero_point, torch.int8, -128, 127)
    up = torch.randn(x.shape)
    (theirs,) = torch.autograd.grad(expected, x, up)
    rounded = fake_quantize_tensor(x, found)
    assert torch.equal(rounded, expected)
    assert torch.equal(torch.autograd.grad(rounded, x, up)[0], theirs)
    assert (theirs == 0).any()
    assert len(ranges(program)) == 14


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([QAT(group_size=24)], "group_size=24` does not divide the 32 weights"),
        ([QAT()], "group_size=32` does not divide the 48"),
        ([QAT(targets=["*embed_tokens"])], "token ids"),
        (
            [QAT(scale_dtype="weight", group_size=16), LoRA(rank=2, dropout=0.1)],
            "passes.lora.dropout=0",
        ),
        ([QAT(scale_dtype="weight", group_size=16), DoRA(rank=2)], "cannot follow 'dora'"),
        (
            [QAT(scale_dtype="weight", group_size=16), Quantize(format="int8"), LoRA(rank=2)],
            "quantized already",
        ),
        ([QAT(targets=["q_porj"])], "nearest: q_proj"),
        ([QAT(targets=[{"sites": "q_proj", "bits": 3}])], "no option `bits`"),
    ],
)
def test_what_makes_no_sense_is_refused(passes, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        captured("llama")[1].apply(*passes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int3"}, "one of 8da4w"),
        ({"weights": "adapter"}, "effective or base"),
        ({"group_size": -1}, "at least 0"),
        ({"enabled_from_step": -1}, "at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        QAT(**options)


def test_adapters_beside_a_rounded_base_are_not_merged():
    program = captured("llama")[1].apply(
        QAT(scale_dtype="weight", group_size=16, weights="base"), LoRA(rank=2)
    )
    with pytest.raises(UserError, match="weights=base"):
        program.apply(Merge())
    with pytest.raises(UserError, match="cannot follow 'qat'"):
        program.apply(LoRA(rank=2, adapter="second"))


def test_texts_of_a_row_are_observed_apart():
    base = captured("llama")[1]
    batch = packed([(5, 4), (7,)], 9)
    found = []
    for one in (masked(batch), batch):
        program = base.apply(QAT(scheme="int8_static"))
        observe(program, [one])
        found.append({name: b for name, b in program.named_buffers() if "observed" in name})
    assert_same_tensors(*found)
    assert found[0]


def test_observing_without_static_sites_runs_nothing():
    program = captured("llama")[1].apply(QAT(scale_dtype="weight", group_size=16))
    observe(program, iter([{"input_ids": torch.full((1, 2), VOCAB)}]))  # out of the vocabulary
