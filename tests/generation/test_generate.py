"""Answers are transformers' own, token for token; batches say what their rows say alone."""

import functools

import pytest
import torch
from transformers import GenerationConfig

import graphtune as gt
from graphtune.generation import CachedDecoder, Sampling, generate
from graphtune.passes import KVCache, LoRA, Quantize
from tests.generation.test_streaming import byte_level
from tests.oracles.models import random_ids, tiny_gpt2, tiny_model

LENGTHS = [3, 17, 9]
NEW = 24


@functools.cache
def model_and_program(family):
    model = tiny_gpt2() if family == "gpt2" else tiny_model(family)
    return model.eval(), gt.capture(model).eval()


@functools.cache
def cached(family, batch):
    options = KVCache(64, batch=batch, prefill=6, logits="last")
    return model_and_program(family)[1].apply(options)


def prompts():
    return [random_ids(1, length, seed=length)[0].tolist() for length in LENGTHS]


def rows(program, given, **options):
    found = [[] for _ in given]
    for token in generate(program, given, **options):
        if token.id is not None:
            found[token.row].append(token.id)
    return found


def theirs(model, prompt, **options):
    options = {"eos_token_id": -1} | options  # none
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=0, **options)
    return model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2"])
def test_greedy_answers_are_transformers(family):
    model, whole = model_and_program(family)
    expected = [theirs(model, prompt).tolist() for prompt in prompts()]
    assert rows(cached(family, 3), prompts(), max_new_tokens=NEW) == expected
    if family == "gemma2":  # without a cache
        assert rows(whole, prompts(), max_new_tokens=NEW) == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "mixtral", "phi3", "qwen3_moe"])
def test_greedy_answers_of_every_family_are_transformers(family):
    test_greedy_answers_are_transformers(family)


def test_penalties_and_ends_are_transformers():
    model, _ = model_and_program("llama")
    prompt = prompts()[1]
    plain = theirs(model, prompt, repetition_penalty=1.7).tolist()
    sampling = Sampling(repetition_penalty=1.7)
    found = rows(cached("llama", 3), [prompt], max_new_tokens=NEW, sampling=sampling)
    assert found == [plain]
    assert plain != theirs(model, prompt).tolist()
    end = plain[9]
    expected = theirs(model, prompt, repetition_penalty=1.7, eos_token_id=end).tolist()
    options = {"max_new_tokens": NEW, "sampling": sampling, "stop_ids": {end}}
    tokens = list(generate(cached("llama", 3), [prompt], **options))
    assert [token.id for token in tokens] == [*expected[:-1], None] and expected[-1] == end
    assert tokens[-1].end == "eos"


def test_a_seed_says_the_same_again_with_and_without_a_cache_and_in_a_batch():
    _, whole = model_and_program("gemma3")
    batched = cached("gemma3", 3)
    options = {"max_new_tokens": NEW}
    sampling = Sampling(temperature=0.8, top_k=30, top_p=0.9, seed=5)
    first = rows(batched, prompts(), sampling=sampling, **options)
    assert rows(batched, prompts(), sampling=sampling, **options) == first
    assert rows(whole, prompts(), sampling=sampling, **options) == first
    for row, prompt in enumerate(prompts()):
        own = Sampling(temperature=0.8, top_k=30, top_p=0.9, seed=5 + row)
        assert rows(batched, [prompt], sampling=own, **options) == [first[row]]
    other = Sampling(temperature=0.8, top_k=30, top_p=0.9, seed=6)
    assert rows(batched, prompts(), sampling=other, **options) != first


def test_streamed_text_is_the_text_of_the_ids_and_ends_at_a_stop_string():
    tokenizer = byte_level()
    program = cached("llama", 3)
    options = {"max_new_tokens": NEW, "sampling": Sampling(temperature=2.0, seed=1)}
    tokens = list(generate(program, prompts(), tokenizer=tokenizer, **options))
    for row in range(3):
        ids = [token.id for token in tokens if token.row == row]
        text = "".join(token.text for token in tokens if token.row == row)
        assert text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert [t.end for t in tokens if t.row == row] == [None] * (NEW - 1) + ["length"]
        stop = text[len(text) // 2 :][:2]
        options_of_row = options | {"sampling": Sampling(temperature=2.0, seed=1 + row)}
        stopped = list(
            generate(
                program,
                [prompts()[row]],
                tokenizer=tokenizer,
                stop_strings=[stop],
                **options_of_row,
            )
        )
        assert "".join(token.text for token in stopped) == text[: text.find(stop)]
        assert stopped[-1].end == "stop" and len(stopped) < NEW


def test_rows_that_have_ended_leave_the_others_alone():
    program = cached("llama", 3)
    full = rows(program, prompts(), max_new_tokens=NEW)
    end = full[0][4]
    tokens = list(generate(program, prompts(), max_new_tokens=NEW, stop_ids={end}))
    for row, ids in enumerate(full):
        expected = ids[: ids.index(end)] if end in ids else ids
        assert [t.id for t in tokens if t.row == row and t.id is not None] == expected


def test_dropout_is_off_and_the_mode_comes_back():
    program = gt.capture(tiny_gpt2(dropout=0.5)).apply(KVCache(64)).train()
    prompt = prompts()[:1]
    first = rows(program, prompt, max_new_tokens=8)
    assert rows(program, prompt, max_new_tokens=8) == first
    assert program.training


@pytest.mark.slow
def test_decoding_compiles_once_and_prompts_once():
    """Whatever their lengths; and says what it says without."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, base = model_and_program("gemma3")
    program = base.apply(LoRA(rank=2), KVCache(64, batch=2, prefill=16, logits="last"))
    decoder = CachedDecoder(program, compile=True)
    counts = []
    for lengths in ([5, 9], [12, 3], [30, 40], [1, 1], [7, 2]):
        given = [random_ids(1, length, seed=length)[0].tolist() for length in lengths]
        found = rows(decoder, given, max_new_tokens=20)
        assert found == rows(program, given, max_new_tokens=20)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts == [2] * 5


@pytest.mark.slow
@pytest.mark.parametrize("passes", [(), (Quantize("int8"),)], ids=["float32", "int8"])
def test_one_row_is_multiplied_in_loops_that_read_weights_as_they_are(passes):
    _, base = model_and_program("qwen2")  # has biases
    program = base.apply(*passes, KVCache(64, prefill=16, logits="last"))
    decoder = CachedDecoder(program, compile=True)
    assert rows(decoder, prompts()[:1], max_new_tokens=NEW) == rows(
        program, prompts()[:1], max_new_tokens=NEW
    )
    with torch.profiler.profile() as profile:
        decoder.step([3])
    names = {event.name for event in profile.events()}
    assert not names & {"aten::mm", "aten::addmm", "aten::linear", "aten::bmm", "mkl::_mkl_linear"}


def test_refusals():
    program = cached("llama", 3)
    with pytest.raises(gt.UserError, match="50 tokens and max_new_tokens=20 .* 64 positions"):
        next(generate(program, [list(range(50))], max_new_tokens=20))
    with pytest.raises(gt.UserError, match="4 prompts do not fit into a cache of batch=3"):
        next(generate(program, [[1]] * 4))
    with pytest.raises(gt.UserError, match="nothing to go on from"):
        next(generate(program, [[1], []]))
    with pytest.raises(gt.UserError, match="needs a tokenizer"):
        next(generate(program, [[1]], stop_strings=["x"]))
    with pytest.raises(gt.UserError, match="no key-value cache"):
        CachedDecoder(model_and_program("llama")[1])
    whole = model_and_program("llama")[1]
    with pytest.raises(gt.UserError, match="120 tokens and max_new_tokens=20 .* 128 positions"):
        next(generate(whole, [list(range(120))], max_new_tokens=20))
