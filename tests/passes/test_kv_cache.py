"""Decoding with a cache is the full forward, token by token, whatever the family and the passes."""

import functools

import pytest
import torch
from torch import nn

import graphtune as gt
from benchmarks.tiny_models import tiny_model as tiny_architecture
from graphtune.passes import QAT, Convert, KVCache, LoRA, Merge, Quantize
from graphtune.passes.kv_cache import cache_of, reset
from tests.oracles.models import FAMILIES, random_ids, tiny_gpt2, tiny_model
from tests.passes.test_composition import shake

POSITIONS = 256
# Of transformers' other architectures, those whose attention is made in another way.
OTHERS = {
    "gpt_oss": "written out, with sinks, and windows in every other layer",
    "llama4_text": "chunks",
    "deepseek_v3": "latent attention, which writes keys in place",
    "falcon": "one head of keys for all",
    "gemma3n_text": "layers that share the keys of others",
    "cohere2": "windows, and layers without positions",
}
FAST = ["gemma2", "gemma3", "gpt2"]
SLOW = [*FAMILIES, *OTHERS, "gpt2"]


@functools.cache
def captured(family):
    if family == "gpt2":
        model = tiny_gpt2(positions=POSITIONS)
    elif family in OTHERS:
        model = tiny_architecture(family)
    else:
        model = tiny_model(family, positions=POSITIONS)
    return gt.capture(model).eval()


@torch.no_grad()
def read(program, ids, calls, positions=None):
    """Logits of all positions, from calls of so many tokens each."""
    if positions is None:
        positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    found, start = [], 0
    for count in calls:
        part = slice(start, start + count)
        found.append(program(ids[:, part], position_ids=positions[:, part]))
        start += count
    assert start == ids.shape[1]
    return torch.cat(found, dim=1)


@torch.no_grad()
def whole(program, ids):
    return program(ids)


def assert_same(found, expected):
    """To 1e-5 of logits of about 2, which those of the tiny models are."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def check_decoding(family, batch, prefill):
    base = captured(family)
    ids = random_ids(batch, 110 if family in OTHERS else 210, seed=3)
    program = base.apply(KVCache(len(ids[0]), batch, prefill)).eval()
    singles = [1] * (len(ids[0]) - 10)
    assert_same(read(program, ids, [prefill, 10 - prefill, *singles]), base(ids))


@pytest.mark.parametrize("family", FAST)
def test_two_hundred_steps_are_the_full_forward(family):
    check_decoding(family, batch=2, prefill=7)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", SLOW)
def test_two_hundred_steps_of_every_family_are_the_full_forward(family, batch):
    check_decoding(family, batch, prefill=6)


def test_ours_decodes_as_its_full_forward():
    """The plain transformer caps scores by a filled mask, and repeats heads in its own way."""
    from graphtune.models.families import build_model

    model = build_model(FAMILIES["gemma2"]())
    base = gt.capture(model).eval()
    ids = random_ids(2, 40)
    program = base.apply(KVCache(64, batch=2, prefill=8)).eval()
    assert_same(read(program, ids, [8, 8, *[1] * 24]), base(ids))


# ------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "gpt2"])
def test_rows_of_different_length(family):
    """Padded on the left in parts, each row says what it says alone."""
    base = captured(family)
    lengths, longest, total = [4, 19, 11], 19, 40
    texts = [random_ids(1, n + total - longest, seed=n) for n in lengths]
    ids = torch.zeros(3, total, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[total - text.shape[1] :] = text
    starts = torch.tensor([[n - longest] for n in lengths])
    program = base.apply(KVCache(64, batch=3, prefill=6)).eval()
    calls = [6, 6, 6, 1, *[1] * (total - longest)]
    found = read(program, ids, calls, torch.arange(total) + starts)
    for row, text in zip(found, texts, strict=True):
        assert_same(row[total - text.shape[1] :], base(text)[0])
    assert found.isfinite().all()


def test_padding_on_the_right_within_a_call():
    base = captured("gemma3")
    short, long = random_ids(1, 3 + 9, seed=1), random_ids(1, 7 + 9, seed=2)
    program = base.apply(KVCache(32, batch=2, prefill=7)).eval()
    first = torch.cat([nn.functional.pad(short[:, :3], (0, 4)), long[:, :7]])
    with torch.no_grad():
        program(first, position_ids=torch.arange(7))
        found = [
            program(
                torch.stack([short[0, 3 + i], long[0, 7 + i]])[:, None],
                position_ids=torch.tensor([[3 + i], [7 + i]]),
            )
            for i in range(9)
        ]
        found = torch.cat(found, dim=1)
        assert_same(found[:1], base(short)[:, 3:])
        assert_same(found[1:], base(long)[:, 7:])


def test_a_text_that_begins_again_sees_nothing_of_the_one_before():
    base = captured("gemma3")
    program = base.apply(KVCache(64, prefill=8)).eval()
    first, second = random_ids(1, 48, seed=1), random_ids(1, 24, seed=2)
    read(program, first, [8] * 6)
    assert_same(read(program, second, [8, 8, *[1] * 8]), base(second))
    reset(program)
    caches = [buffer for name, buffer in program.named_buffers() if name.endswith("_cache")]
    assert len(caches) == 4 and not any(cache.any() for cache in caches)


def test_the_last_logits_alone():
    for family in ("llama", "gemma2"):
        base = captured(family)
        program = base.apply(KVCache(32, logits="last")).eval()
        ids = random_ids(1, 9)
        with torch.no_grad():
            found = program(ids)
            assert found.shape[1] == 1
            assert_same(found, base(ids)[:, -1:])


def test_the_last_logits_of_a_head_in_integers():
    """Backends know a linear by its quantized input, which therefore is what the head is given."""
    targets = ["lm_head", "all-linear"]
    base = captured("llama").apply(QAT(scheme="8da8w", targets=targets), Convert()).eval()
    ids = random_ids(2, 20)
    last = base.apply(KVCache(32, batch=2, logits="last")).eval()
    every = base.apply(KVCache(32, batch=2)).eval()
    torch.testing.assert_close(read(last, ids, [20]), read(every, ids, [20])[:, -1:])
    head = next(n for n in reversed(last.graph.nodes) if "linear" in str(n.target))
    assert "dequantize_affine" in str(head.args[0].target)


# -------------------------------------------------------------------------- memory, sharing


def test_rings_are_bounded_by_the_window_and_heads_are_not_repeated():
    program = captured("gemma3").apply(KVCache(200, batch=2, prefill=16))  # a window of 5
    shapes = {n: tuple(b.shape) for n, b in program.named_buffers() if n.endswith("key_cache")}
    assert shapes == {
        "model.layers.0.self_attn.key_cache": (2, 2, 5 + 16 - 1, 8),
        "model.layers.1.self_attn.key_cache": (2, 2, 200, 8),
    }
    per_layer = 2 * 2 * 8 * 4 * 2  # rows, heads, channels, bytes, keys and values
    assert program.ledger[-1].bytes == (20 + 200) * per_layer
    assert len(program.ledger[-1].sites) == 2


def test_parameters_are_the_given_programs_own_and_the_state_is_the_same():
    tuned = captured("llama").apply(LoRA(rank=2))
    program = tuned.apply(KVCache(32))
    ours, theirs = program.all_parameters(), tuned.all_parameters()
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in theirs)
    assert program.state_dict().keys() == tuned.state_dict().keys()
    ids = random_ids(1, 12)
    before = read(program, ids, [8, 1, 1, 1, 1])
    shake(tuned)
    after = read(program, ids, [8, 1, 1, 1, 1])
    assert not torch.equal(before, after)
    with torch.no_grad():
        assert_same(after, tuned(ids))


def test_nothing_of_a_call_stays_in_autograd():
    program = captured("llama").apply(LoRA(rank=2), KVCache(32))
    for position in range(3):
        program(random_ids(1, 1), position_ids=torch.tensor([position]))
    assert all(not buffer.requires_grad for buffer in program.buffers())


# ------------------------------------------------------------------------------ other passes


PASSES = {
    "lora": [LoRA(rank=3, targets=["all-linear", "lm_head"])],
    "int8": [Quantize(format="int8")],
    "qlora": [Quantize(format="int4", targets=["q_proj", "v_proj", "up_proj"]), LoRA(rank=3)],
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", PASSES)
def test_other_passes_before_and_after(name, order):
    base, cache = captured("llama"), KVCache(32, prefill=8)

    def made(*passes):
        torch.manual_seed(0)
        program = base
        for one in passes:
            program = program.apply(one)
        if any(isinstance(one, LoRA) for one in passes):
            shake(program)
        return program.eval()

    others = PASSES[name]
    plain = made(*others)
    program = made(*others, cache) if order == "before" else made(cache, *others)
    ids = random_ids(1, 20)
    found = read(program, ids, [8, *[1] * 12])
    assert_same(found, whole(plain, ids))
    if name != "int8":
        assert not torch.allclose(found, whole(base, ids), atol=1e-3)
        merge = Merge(dequantize=True)
        assert_same(read(program.apply(merge).eval(), ids, [8, *[1] * 12]), whole(plain, ids))


def test_the_stage_puts_it_last():
    torch.manual_seed(0)
    program = captured("llama").apply(KVCache(32), Merge(), LoRA(rank=2))
    assert [row.name for row in program.ledger] == ["lora", "merge", "kv_cache"]


# ------------------------------------------------------------------- files, export, compilers


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    program = captured("gemma3").apply(KVCache(32, batch=2, prefill=6)).eval()
    loaded = gt.Program.load(program.save(tmp_path / "model.gt")).eval()
    assert cache_of(loaded) == KVCache(32, batch=2, prefill=6)
    ids = random_ids(2, 20)
    calls = [6, 6, *[1] * 8]
    assert torch.equal(read(loaded, ids, calls), read(program, ids, calls))


@torch.no_grad()
def test_a_program_that_has_no_weights_yet(tmp_path):
    model = tiny_model("gemma3")
    model.save_pretrained(tmp_path)
    empty = gt.capture(gt.load_model(str(tmp_path), device="meta", dtype=torch.float32))
    program = gt.load_weights(empty.apply(KVCache(32, prefill=8))).eval()
    ids = random_ids(1, 20)
    expected = model.eval()(ids, use_cache=False).logits
    assert_same(read(program, ids, [8, *[1] * 12]), expected)


@torch.no_grad()
def test_torch_export_takes_it_with_mutated_buffers():
    base = captured("gemma3")
    program = base.apply(KVCache(32, prefill=16, logits="last")).eval()
    seq = torch.export.Dim("seq", min=2, max=16)
    example = (torch.zeros(1, 9, dtype=torch.int64), None, torch.arange(9))
    exported = torch.export.export(
        program, example, dynamic_shapes=({1: seq}, None, {0: seq}), strict=False
    )
    lowered = exported.run_decompositions()
    mutated = set(lowered.graph_signature.buffers_to_mutate.values())
    assert mutated == {n for n, _ in program.named_buffers() if n.endswith("_cache")}
    module, ids = lowered.module(), random_ids(1, 16)
    module(ids[:, :11], None, torch.arange(11))
    found = module(ids[:, 11:], None, torch.arange(11, 16))
    assert_same(found, base(ids)[:, -1:])


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "bloom", "mpt", "rwkv"])
def test_what_is_no_cache_of_keys_is_refused(name):
    program = gt.capture(tiny_architecture(name))
    with pytest.raises(gt.UserError, match="kv_cache.*without a cache|kv_cache.*cannot follow"):
        program.apply(KVCache(32))


def test_a_state_that_no_operator_gives_away_is_refused():
    """Tokens that are shifted by one, before an attention: only results can tell."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model("llama")
            self.config = self.model.config

        def forward(self, input_ids, attention_mask, position_ids):
            logits = self.model(input_ids, attention_mask, position_ids, use_cache=False).logits
            return logits + nn.functional.pad(logits, (0, 0, 1, 0))[:, :-1]

    program = gt.capture(Shifted())
    with pytest.raises(gt.UserError, match="token by token, Shifted computes something else"):
        program.apply(KVCache(32))


def test_refusals():
    for options, message in [
        ({"length": 4}, "length=4"),
        ({"batch": 0}, "batch=0"),
        ({"length": 32, "prefill": 33}, "prefill=33"),
        ({"logits": "some"}, "logits=some"),
    ]:
        with pytest.raises(gt.UserError, match=message):
            KVCache(**options)
    base = captured("llama")
    with pytest.raises(gt.UserError, match="length=257` is more than the model's 256"):
        base.apply(KVCache(257))
    program = base.apply(KVCache(32))
    with pytest.raises(gt.UserError, match="cannot follow 'kv_cache'"):
        program.apply(KVCache(32))
    with pytest.raises(gt.UserError, match="takes no attention_mask"):
        program(random_ids(1, 4), torch.ones(1, 4))
