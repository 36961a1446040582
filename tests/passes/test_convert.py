"""Integers in the place of fake quantization: the same bits, torchao's integers, and a `.pte`."""

import copy
import importlib
import json

import pytest
import torch
from torch import nn
from torchao.prototype.awq.core import AWQObserver
from torchao.quantization import MappingType, quantize_
from torchao.quantization.qat import QATConfig
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8Tensor,
)

import graphtune as gt
from graphtune.errors import UserError
from graphtune.export import to_executorch, to_hf
from graphtune.passes import QAT, Convert, LoRA, Merge
from graphtune.passes.awq import awq
from graphtune.passes.qat import at_step, observe
from graphtune.rewrite import tensor_bytes
from tests.oracles.models import random_ids, tiny_gpt2, tiny_model
from tests.passes.test_composition import shake, tiny_llama
from tests.passes.test_qat import captured, torchao_config, torchaos

IDS = random_ids(2, 9)
SCHEMES = ["8da4w", "8da8w", "int4", "int8", "int8_static"]


def trained(base, *passes):
    """A program with fake quantization, as if it had been trained, in eval mode."""
    program = base.apply(*passes)
    if any(isinstance(one, LoRA) for one in passes):  # else the base's own weights would change
        shake(program)
    observe(program, [{"input_ids": IDS}])
    return program.eval()


def operators(program):
    return {str(node.target) for node in program.graph.nodes}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_logits_are_the_same_bits(family, scheme):
    base = captured(family)[1]
    program = trained(base, QAT(scheme=scheme, group_size=16))
    integers = program.apply(Convert())
    for ids in (IDS, random_ids(3, 5, seed=2)):
        assert torch.equal(integers(ids), program(ids))
    assert not any("fake_quantize" in name for name in operators(integers))
    assert not any(p.requires_grad for p in integers.parameters())
    assert not any("_proj.weight" in name for name, _ in integers.named_parameters())
    assert tensor_bytes(integers) < 0.7 * tensor_bytes(program)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weights", ["effective", "base"])
def test_with_lora(weights, scheme):
    base = captured("qwen2")[1]
    program = trained(
        base, QAT(scheme=scheme, group_size=16, weights=weights), LoRA(rank=4, alpha=8)
    )
    integers = program.apply(Convert())
    assert torch.equal(integers(IDS), program(IDS))
    adapters = [name for name, _ in integers.named_parameters() if "lora" in name]
    assert bool(adapters) == (weights == "base")
    if weights == "effective":
        merged = program.apply(Merge(), Convert())
        assert torch.equal(merged(IDS), program(IDS))


@pytest.mark.parametrize("make", [tiny_gpt2, lambda: tiny_model("mixtral")])
def test_other_layouts(make):
    program = trained(gt.capture(make()), QAT(group_size=8), LoRA(rank=2))
    assert torch.equal(program.apply(Convert())(IDS), program(IDS))


def test_in_bfloat16_with_embeddings():
    base = gt.capture(tiny_model("llama").to(torch.bfloat16))
    rules = [
        {"sites": "*embed_tokens", "scheme": "int4"},
        {"sites": "lm_head", "scheme": "8da8w"},  # tied to the embedding: other integers
        "all-linear",
    ]
    program = trained(base, QAT(targets=rules, group_size=16))
    assert torch.equal(program.apply(Convert())(IDS), program(IDS))


def test_tied_weights_quantized_alike_are_kept_once():
    rules = [{"sites": "*embed_tokens", "scheme": "int8"}, {"sites": "lm_head", "scheme": "8da8w"}]
    program = trained(captured("llama")[1], QAT(targets=rules))
    integers = program.apply(Convert())
    assert torch.equal(integers(IDS), program(IDS))
    assert len([name for name, _ in integers.named_buffers() if name.endswith("qdata")]) == 1


@pytest.mark.parametrize("scheme", ["8da4w", "int4", "int8"])
def test_integers_are_torchaos(scheme):
    model, base = captured("qwen2")
    group = 16 if "4" in scheme else None
    program = base.apply(QAT(scheme=scheme, group_size=group, scale_dtype="weight"))
    integers = program.apply(Convert())
    reference = torchaos(model, scheme, group)
    quantize_(reference, QATConfig(torchao_config(scheme, group), step="convert"))
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            theirs = module.weight
            for suffix in ("qdata", "scale", "zero_point"):
                ours = integers.get_buffer(f"{name}.weight_{suffix}")
                their = getattr(theirs, suffix)
                assert torch.equal(ours, their), (name, suffix)
    expected = reference(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(integers(IDS), expected, rtol=1e-5, atol=1e-5)


def test_hqq_is_torchaos():
    model, base = captured("llama")
    program = base.apply(QAT(scheme="int4", group_size=16))
    integers = program.apply(Convert("hqq"))
    weight = model.model.layers[1].mlp.up_proj.weight
    theirs = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        [1, 16],
        torch.int4,
        mapping_type=MappingType.SYMMETRIC,
        intx_choose_qparams_algorithm="hqq_scale_only",
    )
    for suffix in ("qdata", "scale", "zero_point"):
        ours = integers.get_buffer(f"model.layers.1.mlp.up_proj.weight_{suffix}")
        assert torch.equal(ours, getattr(theirs, suffix)), suffix
    assert integers.ledger[-1].numerics == "lossy"


def test_awq_has_torchaos_scales():
    model = tiny_llama(False, False)
    with torch.no_grad():  # a few channels of the input are large, as in language models
        model.model.layers[0].input_layernorm.weight[::16] *= 20
    program = gt.capture(model).apply(QAT(scheme="int4")).eval()
    ids = random_ids(2, 30, 4)
    scaled = awq(program, [{"input_ids": ids}])
    assert len(scaled.ledger[-1].sites) == 7
    integers = scaled.apply(Convert())
    assert torch.equal(integers(IDS), scaled(IDS))
    name = "model.layers.0.self_attn.k_proj"  # its input is the same with fake quantization
    observer = AWQObserver(model.get_submodule(name).weight.detach(), None, four_bits())
    model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: observer(args[0].flatten(0, 1), None)
    )
    model(input_ids=ids, use_cache=False)
    scale = observer.calculate_qparams()
    assert (scale != scale[0]).any()
    torch.testing.assert_close(scaled.get_buffer(f"{name}.input_scale"), 1.0 / scale)


def four_bits():
    return torchao_config("int4", 32)


def test_saved_and_loaded(tmp_path):
    program = trained(captured("llama")[1], QAT(group_size=16)).apply(Convert())
    loaded = gt.Program.load(program.save(tmp_path / "model.gt"))
    assert torch.equal(loaded(IDS), program(IDS))
    fake = trained(captured("llama")[1], QAT(group_size=16, scheme="int8_static"))
    loaded = gt.Program.load(fake.save(tmp_path / "fake.gt"))
    assert torch.equal(loaded.apply(Convert())(IDS), fake(IDS))


def test_on_a_program_without_weights(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    passes = [QAT(group_size=16), Convert()]
    empty = gt.capture(gt.load_model(tmp_path, device="meta")).apply(*passes)
    expected = gt.capture(gt.load_model(tmp_path)).apply(*passes)
    assert torch.equal(gt.load_weights(empty)(IDS), expected(IDS))


def test_what_cannot_be_converted():
    base = captured("llama")[1]
    with pytest.raises(UserError, match="no fake quantization"):
        base.apply(Convert())
    late = base.apply(QAT(group_size=16, enabled_from_step=3))
    with pytest.raises(UserError, match="has not begun"):
        late.apply(Convert())
    at_step(late, 3)
    late.apply(Convert())
    with pytest.raises(UserError, match="never observed"):
        base.apply(QAT(scheme="int8_static"), Convert())
    with pytest.raises(UserError, match="affine or hqq"):
        Convert("gptq")
    integers = base.apply(QAT(group_size=16), Convert())
    with pytest.raises(UserError, match="cannot follow 'convert'"):
        integers.apply(Convert())


def test_no_layout_of_hugging_face_holds_it(tmp_path):
    integers = captured("llama")[1].apply(QAT(group_size=16), Convert())
    with pytest.raises(UserError, match="no layout"):
        to_hf(integers, tmp_path / "hf")


@pytest.fixture(scope="module")
def wide():
    """Groups of 32, which XNNPACK needs, fit into its rows."""
    return gt.capture(tiny_llama(False, False, width=64, heads=4, kv_heads=2))


def test_lowered_and_run(wide, tmp_path):
    """In the runtime's integers the logits are close to the program's."""
    importlib.import_module("executorch.runtime")
    rules = ["all-linear", {"sites": "*embed_tokens", "scheme": "int4"}]
    integers = trained(wide, QAT(targets=rules), LoRA(rank=2)).apply(Convert())
    report = to_executorch(integers, tmp_path / "four", kv_cache=False, max_seq_len=16)
    assert report.coverage["torchao_quantize_affine_default"] == (7, 0)
    assert report.coverage["aten_linear_default"] == (8, 0)
    assert report.max_abs_diff < 0.05 * report.max_abs_logit
    plain = copy.copy(wide).eval()
    full = to_executorch(plain, tmp_path / "full", kv_cache=False, max_seq_len=16)
    assert report.size_bytes < 0.6 * full.size_bytes
    manifest = json.loads((tmp_path / "four" / "manifest.json").read_text())
    assert manifest["files"]["model.pte"]["bytes"] == report.size_bytes


def test_what_xnnpack_has_not_is_refused(wide, tmp_path):
    integers = trained(wide, QAT(scheme="int4")).apply(Convert())
    with pytest.raises(UserError, match="8da4w or 8da8w"):
        to_executorch(integers, tmp_path, max_seq_len=16)
    assert not list(tmp_path.glob("*.pte"))
