"""Chat formats: their text as the models' makers write it, and templates of one's own."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from graphtune.data.templates import TEMPLATES, adds_bos, chat_template
from graphtune.errors import UserError
from tests.data.conftest import with_template

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
# By hand, from the model cards and reference code; <s> and </s> are the tokenizer's tokens.
EXPECTED = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama4": "<s><|header_start|>system<|header_end|>\n\nBe kind.<|eot|>"
    "<|header_start|>user<|header_end|>\n\nHi<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\nHello<|eot|>"
    "<|header_start|>user<|header_end|>\n\nBye<|eot|><|header_start|>assistant<|header_end|>\n\n",
    "mistral": "<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "mistral_v3": "<s>[INST]Be kind.\n\nHi[/INST]Hello</s>[INST]Bye[/INST]",
    "mistral_v7": "<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]Hi[/INST]Hello</s>"
    "[INST]Bye[/INST]",
    "gemma": "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    "Hello<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    "phi3": "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
    "<|user|>\nBye<|end|>\n<|assistant|>\n",
    "phi4": "<|im_start|>system<|im_sep|>Be kind.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
    "<|im_start|>assistant<|im_sep|>Hello<|im_end|><|im_start|>user<|im_sep|>Bye<|im_end|>"
    "<|im_start|>assistant<|im_sep|>",
    "alpaca": "<s>Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>"
    "### Instruction:\nBye\n\n### Response:\n",
    "summarize": "<s>Be kind.Summarize this dialogue:\nHi\n---\nSummary:\nHello</s>"
    "Summarize this dialogue:\nBye\n---\nSummary:\n",
    "grammar": "<s>Be kind.Correct this to standard English: Hi\n---\nCorrected: Hello</s>"
    "Correct this to standard English: Bye\n---\nCorrected: ",
    "question_answer": "<s>Be kind.Question: Hi\n\nAnswer: Hello</s>Question: Bye\n\nAnswer: ",
}


@pytest.fixture(scope="module")
def tokenizer(backend: Tokenizer) -> PreTrainedTokenizerBase:
    return with_template(backend, "chatml")


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: object,
    messages: list[dict[str, object]],
    *,
    generation: bool = True,
) -> str:
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=chat_template(template, tokenizer),
        tokenize=False,
        add_generation_prompt=generation,
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_the_models_makers(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    assert render(tokenizer, name, CHAT) == EXPECTED[name]


def test_phi3_ends_with_its_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert render(tokenizer, "phi3", CHAT[:3], generation=False).endswith("<|end|>\n<|endoftext|>")


def test_alpaca_has_a_preamble_of_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    text = render(tokenizer, "alpaca", CHAT[1:2])
    assert text.startswith("<s>Below is an instruction that describes a task. Write a response")
    assert text.endswith("request.\n\n### Instruction:\nHi\n\n### Response:\n")


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=10, deadline=None)
@given(words=st.lists(st.text(max_size=10), min_size=4, max_size=4))
def test_a_prompt_begins_the_conversation_it_leads_to(
    tokenizer: PreTrainedTokenizerBase, name: str, words: list[str]
) -> None:
    chat = [{"role": m["role"], "content": w} for m, w in zip(CHAT, words, strict=True)]
    whole = render(tokenizer, name, chat)
    assert whole.startswith(render(tokenizer, name, chat[:2]))


def test_a_mapping_is_written_around_the_words(tokenizer: PreTrainedTokenizerBase) -> None:
    mapping = {
        "user": ["Q: ", '\n"A" {{ x }}: '],
        "assistant": ("", "{eos}\n"),
        "ipython": ["", ""],
    }
    text = render(tokenizer, mapping, [*CHAT[1:3], {"role": "tool", "content": "42"}])
    assert text == '<s>Q: Hi\n"A" {{ x }}: Hello</s>\n42'


def test_a_turn_that_nothing_ends_ends_the_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    text = render(tokenizer, {"user": ("", "\n"), "assistant": ("", "\n")}, CHAT[1:3])
    assert text == "<s>Hi\nHello</s>\n"


def test_beginning_of_sequence_is_written_if_plain_text_has_it(backend: Tokenizer) -> None:
    tokenizer = with_template(backend, "chatml")
    assert adds_bos(tokenizer)
    tokenizer.add_bos_token = False
    assert not adds_bos(tokenizer)
    assert render(tokenizer, "question_answer", CHAT[1:2]) == "Question: Hi\n\nAnswer: "


def test_jinja_text_and_files(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    jinja = "{% for m in messages %}{{ m.content }};{% endfor %}"
    assert render(tokenizer, jinja, CHAT[1:3]) == "Hi;Hello;"
    path = tmp_path / "mine.jinja"
    path.write_text(jinja)
    assert render(tokenizer, path, CHAT[1:3]) == render(tokenizer, str(path), CHAT[1:3])
    assert chat_template(None, tokenizer) == tokenizer.chat_template


def test_text_in_parts_is_joined(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    for name in TEMPLATES:
        whole = render(tokenizer, name, CHAT[1:2])
        assert render(tokenizer, name, [{"role": "user", "content": parts}]) == whole


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatlm", "dataset.template: 'chatlm' is no template's name.*did you mean 'chatml'"),
        ("no/such.jinja", "dataset.template: 'no/such.jinja' .* there are chatml, llama2"),
        ({"bot": ["", ""]}, "dataset.template.bot: unknown role; use system, user"),
        ({"user": ["a"]}, r"dataset.template.user: must be two texts, \[before, after\], not"),
        ({"user": "ab"}, "dataset.template.user: must be two texts"),
    ],
)
def test_what_is_no_template_is_refused(
    tokenizer: PreTrainedTokenizerBase, template: object, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        chat_template(template, tokenizer)


def test_a_turn_must_be_able_to_end(backend: Tokenizer) -> None:
    tokenizer = with_template(backend, "chatml")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="dataset.template: .* no end-of-sequence token"):
        chat_template("alpaca", tokenizer)
    assert chat_template("chatml", tokenizer)
