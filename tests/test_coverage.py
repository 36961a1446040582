"""Odd architectures are captured and trained as usual ones are; `docs/coverage.md` has them all."""

import pytest
import torch
from torch import nn

import graphtune as gt
from benchmarks.coverage_models import STAGES, Chain, eager_logits, random_ids
from benchmarks.tiny_models import tiny_model
from graphtune.models.patches import exportable

ODD = {
    "mamba": "a state space",
    "qwen3_next": "linear attention beside full attention",
    "deepseek_v3": "latent attention; experts chosen by sigmoids",
    "llama4_text": "chunks of attention",
    "bart": "the decoder of an encoder-decoder",
}


@pytest.mark.parametrize("name", ODD)
def test_whole_chain(name):
    chain = Chain(name)
    for stage in STAGES:
        getattr(chain, stage)()


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "llama4_text", "bloom", "camembert"])
def test_padded_batch_equals_eager(name):
    """Layers that take their padding in other forms than a mask of attention get it, too."""
    model = tiny_model(name).eval()
    program = gt.capture(model)
    ids = random_ids(3, 14)
    padding = torch.ones(3, 14, dtype=torch.int64)
    padding[0, :4] = 0
    padding[1, :9] = 0
    ids[padding == 0] = model.config.pad_token_id or 0
    inputs = {"input_ids": ids, "attention_mask": padding}
    if name in ("qwen3_next", "llama4_text"):  # others count them themselves
        inputs["position_ids"] = (padding.cumsum(-1) - 1).clamp(min=0)
    expected = model(**inputs, use_cache=False).logits[padding.bool()]
    found = program(ids, padding)[padding.bool()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_chunks_of_a_packed_row_begin_with_each_text():
    model = tiny_model("llama4_text").eval()
    program = gt.capture(model)
    first, second = random_ids(1, 7, seed=2), random_ids(1, 8, seed=3)
    row = torch.cat([first, second], dim=1)
    text = torch.tensor([0] * 7 + [1] * 8)
    mask = (text[:, None] == text) & torch.ones(15, 15, dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(7), torch.arange(8)])[None]
    found = program(row, mask[None, None], positions)
    expected = torch.cat([eager_logits(model, ids) for ids in (first, second)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_patches_are_gone_after_the_export():
    model = tiny_model("mamba")
    module = __import__(type(model).__module__, fromlist=["mamba_selective_scan"])
    before = module.mamba_selective_scan
    with exportable(model):
        assert module.mamba_selective_scan is not before
        assert "forward" in vars(model)
    assert module.mamba_selective_scan is before
    assert "forward" not in vars(model)


def test_what_cannot_be_exported_is_refused_in_one_line():
    with pytest.raises(gt.UserError, match="^capture: CpmAntForCausalLM cannot be exported: ") as e:
        gt.capture(tiny_model("cpmant"))
    assert "\n" not in str(e.value)


class _ByLength(nn.Module):
    """Does something else from 16 tokens on."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.short, self.long = nn.Linear(8, 64), nn.Linear(8, 64)

    def forward(self, input_ids, attention_mask):
        head = self.short if input_ids.shape[1] < 16 else self.long
        return head(self.embed(input_ids))


def test_a_model_that_differs_by_length_is_refused():
    with pytest.raises(gt.UserError, match="computes something else at length"):
        gt.capture(_ByLength())


def test_a_mask_of_its_own_is_asked_for_once():
    """A model that lays windows by itself gets the one boolean mask, whatever its config says."""

    class Windowed(nn.Module):
        applies_windows = True

        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"layer_types": ["sliding_attention", "other"]})()
            self.embed = nn.Embedding(16, 8)

        def forward(self, input_ids, attention_mask):
            x = self.embed(input_ids)
            mean = attention_mask[:, 0].to(x.dtype) @ x
            return mean @ self.embed.weight.T

    model = Windowed()
    ids, mask = random_ids(2, 5) % 16, torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    assert torch.equal(gt.capture(model)(ids), model(ids, mask))
