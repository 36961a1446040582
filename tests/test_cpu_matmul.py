"""oneDNN's products are torch's, and a compiled step computes all of its products with them."""

import pytest
import torch

import graphtune as gt
from graphtune import cpu_matmul
from graphtune.passes import Full, FusedLoss, LoRA
from tests.oracles.models import random_ids, tiny_gpt2, tiny_model

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


@pytest.mark.parametrize("shape", [(7, 5, 3), (64, 33, 128), (1, 8, 16), (9, 1, 2), (2, 3, 1)])
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_the_operator_multiplies_any_strides(shape, turned):
    m, k, n = shape
    a, b = torch.randn(m, k), torch.randn(k, n)
    laid_out = [
        one.t().contiguous().t() if t else one for one, t in zip((a, b), turned, strict=True)
    ]
    torch.testing.assert_close(cpu_matmul.mm(*laid_out), a @ b)
    bias = torch.randn(n)
    torch.testing.assert_close(cpu_matmul.mm(*laid_out, bias), a @ b + bias)


def test_rows_of_a_wider_matrix_and_no_rows():
    wide = torch.randn(8, 20)
    torch.testing.assert_close(
        cpu_matmul.mm(wide[:, 3:11], wide[:, :4]), wide[:, 3:11] @ wide[:, :4]
    )
    assert cpu_matmul.mm(torch.randn(0, 4), torch.randn(4, 5)).shape == (0, 5)


@pytest.mark.parametrize("technique", ["lora", "full, biases"])
@pytest.mark.parametrize("preferred", [True, False])
def test_a_compiled_step_multiplies_by_the_library_of_choice(technique, preferred, monkeypatch):
    monkeypatch.setattr(cpu_matmul, "prefers_onednn", lambda: preferred)
    torch._dynamo.reset()
    if technique == "lora":
        program = gt.capture(tiny_model("llama")).apply(LoRA(rank=4), FusedLoss(2))
    else:
        program = gt.capture(tiny_gpt2()).apply(Full())
    optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=1e-3)
    step = gt.compile_step(program, optimizer)
    ids = random_ids(2, 12)
    batch = {"input_ids": ids, "labels": ids}
    assert step.check(batch) < 1e-4
    step(batch)  # compiles for training
    with torch.profiler.profile() as profile:
        step(batch)
    names = [event.name for event in profile.events()]
    ours, theirs = names.count("graphtune::onednn_mm"), names.count("aten::mm")
    theirs += names.count("aten::addmm") + names.count("mkl::_mkl_linear")
    sums = technique != "lora"  # the gradients of a tied weight are added up by one product
    assert ours > 14 and theirs == sums if preferred else theirs > 14 and ours == 0


def test_only_amd_processors_with_wide_instructions_prefer_it(monkeypatch):
    def chosen(**known):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
        cpu_matmul.prefers_onednn.cache_clear()
        return cpu_matmul.prefers_onednn()

    mkl = torch.backends.mkl.is_available()
    try:
        assert chosen(cpu_name="AMD EPYC", avx512_f=True) == mkl
        assert not chosen(cpu_name="AMD EPYC", avx512_f=False)
        assert not chosen(cpu_name="Intel(R) Xeon(R)", avx512_f=True)
        assert not chosen()
    finally:
        cpu_matmul.prefers_onednn.cache_clear()
