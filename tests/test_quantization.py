"""Quantization formats against torchao's, bit for bit, and their operators under a compiler."""

import pytest
import torch
from torch import fx
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import profile
from torch.utils.checkpoint import CheckpointPolicy
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import (
    NF4Tensor,
    linear_nf4,
    to_nf4,
)

from graphtune.quantization import FORMATS, NF4, NF4_LEVELS, Int4, Int8, _nearest
from graphtune.torch_private import salted_cache

DTYPES = (torch.float32, torch.bfloat16)
ALL = [NF4(), NF4(block_size=32, scale_block_size=3), Int8(), Int4(), Int4(group_size=16)]


def random_weight(*shape, dtype=torch.float32, seed=0):
    """Normal values; rows of different sizes, so that scales differ."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return (weight * torch.rand(*shape[:-1], 1, generator=generator) / 10).to(dtype)


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 256), (256, 192), (16, 3072)])
@pytest.mark.parametrize("sizes", [(64, 256), (32, 64), (128, 8)])
def test_nf4_is_torchaos(shape, sizes, dtype):
    for seed in range(3):
        weight = random_weight(*shape, dtype=dtype, seed=seed)
        expected = to_nf4(weight, *sizes)
        kind = NF4(*sizes)
        stored = kind.quantize(weight)
        assert_same(stored["nf4"], expected.quantized_data)
        assert_same(stored["nf4_scales"], expected.quantized_scalers)
        assert_same(stored["nf4_scale_factors"], expected.quantization_factor.float())
        assert_same(stored["nf4_scale_mean"], expected.scaler_mean.float())
        assert_same(stored["nf4_levels"], expected.nf4.float())
        assert_same(kind.dequantize(stored, shape, dtype), expected.get_original_weight())


def all_bfloat16():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    return values[values.abs() <= 1]


def around_middles():
    """float32 values, a step apart, on both sides of each middle of two levels."""
    levels = torch.tensor(NF4_LEVELS)
    at = (levels[1:] + levels[:-1]) / 2
    values = [at]
    for direction in (-2.0, 2.0):
        value = at
        for _ in range(40):
            value = value.nextafter(torch.tensor(direction))
            values.append(value)
    return torch.cat(values)


@pytest.mark.parametrize("values", [all_bfloat16, around_middles])
def test_nf4_rounds_as_torchao_at_ties(values):
    values = values()
    values = values[: values.numel() // 2 * 2]
    levels = torch.tensor(NF4_LEVELS).to(values.dtype)
    codes = NF4Tensor.quantize_tensor_nearest(values, levels).to(torch.uint8)
    found = _nearest(values.reshape(-1, 2), values.new_ones(values.numel() // 2), levels.float())
    assert torch.equal(found, codes[::2] << 4 | codes[1::2])


def test_nf4_takes_a_last_scale_block_that_is_shorter():
    # Filled up with scales equal to their mean, a weight keeps mean, factors and codes.
    kind = NF4(block_size=2, scale_block_size=4)
    absmax = torch.tensor([1.0, 2, 3, 4, 2, 3, 5, 1, 1, 3.0])
    filled = torch.cat([absmax, absmax.mean().repeat(2)])
    found = kind.quantize(absmax.repeat_interleave(2))
    expected = to_nf4(filled.repeat_interleave(2), 2, 4)
    assert_same(found["nf4_scales"], expected.quantized_scalers[:10])
    assert_same(found["nf4_scale_factors"], expected.quantization_factor)
    value = kind.dequantize(found, (20,), torch.float32)
    assert_same(value, expected.get_original_weight()[:20])


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_zeros_and_constants_survive(kind):
    weight = torch.tensor([0, 0.1, 0.1, 1.0]).unsqueeze(1).repeat(1, 64)
    value = kind.dequantize(kind.quantize(weight), weight.shape, weight.dtype)
    assert torch.equal(value[0], torch.zeros(64))
    assert torch.allclose(value, weight, rtol=0.08)
    stored = kind.quantize(weight[1:3])
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())
    same = kind.dequantize(stored, (2, 64), weight.dtype)
    assert torch.allclose(same, weight[1:3], rtol=0.08)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (5, 96)])
def test_integers_are_torchaos(shape, dtype):
    weight = random_weight(*shape, dtype=dtype)
    configs = {
        Int8(): Int8WeightOnlyConfig(set_inductor_config=False),
        Int4(): IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }
    for kind, config in configs.items():
        module = torch.nn.Linear(*shape[::-1], bias=False, dtype=dtype)
        module.weight.data = weight.clone()
        quantize_(module, config)
        stored = kind.quantize(weight)
        codes = stored[kind.name]
        if kind == Int4():
            codes = torch.stack([codes >> 4, codes & 15], -1).flatten(-2).to(torch.int8) - 8
        assert_same(codes, module.weight.qdata)
        assert_same(stored[f"{kind.name}_scales"], module.weight.scale)
        assert_same(kind.dequantize(stored, shape, dtype), module.weight.dequantize())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("kind", ALL, ids=str)
def test_round_trip_of_experts(kind, dtype):
    """3-D weights are stored as their rows are; the error is that of one rounding."""
    weight = random_weight(3, 32, 64, dtype=dtype)
    stored = kind.quantize(weight)
    value = kind.dequantize(stored, weight.shape, dtype)
    assert value.dtype == dtype and value.shape == weight.shape
    rows = weight.reshape(96, 64)
    assert torch.equal(value.view_as(rows), kind.dequantize(kind.quantize(rows), (96, 64), dtype))
    # Half of the widest step, of the largest value in the row; and the scale's own error.
    step = {NF4: 0.1519 + 0.02, Int8: 0.5 / 127 + 0.008, Int4: 0.5 / 7.5 + 0.02}[type(kind)]
    largest = weight.float().abs().amax(-1, keepdim=True)
    spread = 0.004 * weight.float().abs().max() if isinstance(kind, NF4) else 0
    assert ((value.float() - weight.float()).abs() <= step * largest + spread).all()
    assert not torch.equal(value, weight)


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_meta_tensors_give_shapes(kind):
    for dtype in (*DTYPES, torch.float16):
        weight = random_weight(6, 64, dtype=dtype)
        stored = kind.quantize(weight.requires_grad_())
        shapes = kind.quantize(weight.to("meta"))
        assert list(shapes) == list(stored)
        for suffix, tensor in stored.items():
            assert not tensor.requires_grad
            assert shapes[suffix].is_meta
            assert shapes[suffix].shape == tensor.shape and shapes[suffix].dtype == tensor.dtype
        value = kind.dequantize(shapes, weight.shape, dtype)
        assert value.is_meta and value.shape == weight.shape and value.dtype == dtype


def test_bytes_stored():
    def bits(kind):
        stored = kind.quantize(torch.empty(1024, 1024, dtype=torch.bfloat16, device="meta"))
        return sum(t.numel() * t.element_size() for t in stored.values()) * 8 / 2**20

    assert bits(NF4()) == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-3)
    assert bits(Int8()) == pytest.approx(8 + 32 / 1024)
    assert bits(Int4()) == pytest.approx(4.5)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 10\), 30, must be a multiple of .*, 64"):
        NF4().check((3, 10))
    with pytest.raises(ValueError, match=r"\(64, 10\) must be a multiple of .*, 32"):
        Int4().quantize(torch.zeros(64, 10))
    with pytest.raises(ValueError, match="must have rows"):
        Int8().check(())
    for kind in ALL:
        kind.check((3, 2, 64))
        with pytest.raises(ValueError):
            kind.check((0, 64))
    for wrong in ({"block_size": 7}, {"scale_block_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            NF4(**wrong)
    with pytest.raises(ValueError, match="group_size=3"):
        Int4(group_size=3)
    assert {kind.name: kind for kind in (NF4, Int8, Int4)} == FORMATS


@pytest.mark.parametrize("kind", [NF4(block_size=32, scale_block_size=3), Int8(), Int4()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_pass_torchs_own_checks(kind, dtype):
    weight = random_weight(4, 64, dtype=dtype)
    stored = kind.quantize(weight)
    torch.library.opcheck(kind.op, kind.arguments(stored, [4, 64], dtype))


@pytest.mark.parametrize("kind", [NF4(), Int8(), Int4()], ids=str)
def test_no_gradient_flows_to_what_is_stored(kind):
    stored = kind.quantize(random_weight(4, 64))
    floats = [t.requires_grad_() for t in stored.values() if t.is_floating_point()]
    assert floats
    value = kind.dequantize(stored, (4, 64), torch.float32)
    assert not value.requires_grad


def two_linears(kind, dtype, tagged, size=64):
    """A graph of two linears over dequantized weights, and the weights themselves."""
    root, graph = torch.nn.Module(), fx.Graph()
    node, weights = graph.placeholder("x"), []
    for layer in range(2):
        weight = random_weight(size, size, dtype=dtype, seed=layer)
        weights.append(weight)
        reads = {}
        for suffix, tensor in kind.quantize(weight).items():
            root.register_buffer(f"w{layer}_{suffix}", tensor)
            reads[suffix] = graph.get_attr(f"w{layer}_{suffix}")
        value = graph.call_function(kind.op, kind.arguments(reads, [size, size], dtype))
        if tagged:
            value.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            value.meta["ac_graph_id"] = 1
        node = graph.call_function(torch.ops.aten.linear.default, (node, value))
    graph.output(node)
    return fx.GraphModule(root, graph), weights


def run(module, rows=3, dtype=torch.float32, size=64):
    """Output, gradient of the input, and how many whole weights are saved for backward."""
    x = random_weight(rows, size, dtype=dtype, seed=9).requires_grad_()
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = module(x)
    y.float().square().sum().backward()
    weights = [t for t in saved if t.is_floating_point() and t.numel() == size * size]
    return y.detach(), x.grad, len(weights)


def operators_called(run):
    """Names of our operators that are called while `run` runs, as the profiler sees them."""
    with profile() as profiler:
        run()
    return {event.name for event in profiler.events() if "dequantize" in event.name}


@pytest.fixture
def fresh_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_nf4_linears_are_torchaos():
    module, weights = two_linears(NF4(), torch.float32, tagged=False, size=128)
    y, grad, _ = run(module, size=128)
    x = random_weight(3, 128, seed=9).requires_grad_()
    expected = linear_nf4(linear_nf4(x, to_nf4(weights[0])), to_nf4(weights[1]))
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, x.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [NF4(), Int8(), Int4()], ids=str)
def test_tagged_weights_are_not_saved_for_backward(kind):
    for tagged in (True, False):
        torch._dynamo.reset()
        module, _ = two_linears(kind, torch.float32, tagged)
        *_, saved = run(torch.compile(module, backend="aot_eager", fullgraph=True))
        assert saved == (0 if tagged else 2)


def test_inductor_fuses_and_saves_nothing(fresh_caches):
    """Cold, and again from the caches on disk."""
    module, _ = two_linears(NF4(), torch.float32, tagged=True)
    expected_y, expected_grad, _ = run(module)
    assert operators_called(lambda: run(module)) == {"graphtune::dequantize_nf4"}
    for hits in (0, 1):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, dynamic=True)
        y, grad, saved = run(compiled)
        assert saved == 0
        torch.testing.assert_close(y, expected_y)
        torch.testing.assert_close(grad, expected_grad)
        assert counters["aot_autograd"]["autograd_cache_hit"] == hits
        assert not operators_called(lambda: run(compiled))  # noqa: B023
    compilations = counters["stats"]["unique_graphs"]
    run(compiled, rows=5)
    assert counters["stats"]["unique_graphs"] == compilations  # the batch is dynamic

    with salted_cache("untagged"):  # the caches' keys leave the tags out
        torch._dynamo.reset()
        module, _ = two_linears(NF4(), torch.float32, tagged=False)
        *_, saved = run(torch.compile(module, fullgraph=True))
    assert saved == 2


def test_inductor_gives_the_same_weights(fresh_caches):
    """Bit for bit, though compilers do not round where eager bfloat16 arithmetic does."""
    kinds = [(kind, dtype) for kind in (NF4(), Int8(), Int4()) for dtype in DTYPES]
    stored = [kind.quantize(random_weight(64, 256, dtype=dtype)) for kind, dtype in kinds]

    def weights(stored):
        return [
            kind.dequantize(one, [64, 256], dtype)
            for one, (kind, dtype) in zip(stored, kinds, strict=True)
        ]

    compiled = torch.compile(weights, fullgraph=True)(stored)
    for found, expected in zip(compiled, weights(stored), strict=True):
        assert_same(found, expected)
