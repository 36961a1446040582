"""Prompts: where an answer ends."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from graphtune.data.templates import TEMPLATES, chat_template
from graphtune.generation import stop_ids

ENDS = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>", "chatml": "<|im_end|>"}


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({"a": 0, "\n": 1}, []))
    backend.add_special_tokens(["<s>", "</s>", *ENDS.values(), "<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("marked", [True, False])
def test_the_templates_end_of_turn_ends_an_answer(name: str, marked: bool) -> None:
    """Raw tokenizers have the end of a document as `eos_token`, which chats do not write."""
    one = tokenizer()
    program: Any = SimpleNamespace(config=SimpleNamespace(eos_token_id=[7, 8]))
    eos = {one.convert_tokens_to_ids("</s>"), 7, 8}
    assert stop_ids(program, one) == eos
    text = chat_template(name, one)
    if not marked:
        text = text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    one.chat_template = text
    assert stop_ids(program, one) == eos | {one.convert_tokens_to_ids(ENDS[name])}


def test_a_template_that_ends_turns_with_the_end_of_sequence_adds_nothing() -> None:
    one = tokenizer()
    program: Any = SimpleNamespace(config=SimpleNamespace())
    for name in ("llama2", "mistral_v3", "alpaca"):
        assert name in TEMPLATES
        one.chat_template = chat_template(name, one)
        assert stop_ids(program, one) == {one.eos_token_id}
    one.chat_template = "{{ raise_exception('no') }}"
    assert stop_ids(program, one) == {one.eos_token_id}
