"""Chat templates: what is written around each turn of a conversation.

A tokenizer's own template is the default. The formats here are data, and each becomes one Jinja
template (`to_jinja`), so that everything is rendered in one way and a tokenizer that is saved
can carry what it was trained with. `{% generation %}` marks what is learned: the assistant's
words and what ends its turn.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from graphtune.errors import UserError

Pair = tuple[str, str]
Template = str | Path | Mapping[str, tuple[str, str] | list[str]]
"""A name in `TEMPLATES`, Jinja text, a path to a `.jinja` file, or `{role: [before, after]}`."""

_NOTHING: Pair = ("", "")


@dataclass(frozen=True)
class ChatFormat:
    """A chat format: what stands before and after the words of each role.

    `{bos}` and `{eos}` stand for the tokenizer's tokens. What stands before the assistant's words
    is also the prompt for generation; what stands after them is learned, but for whitespace at
    its end. Where that is nothing, it is `{eos}`: every turn must end somehow.

    user, assistant, system: (before, after).
    tool: for the results of tools; None refuses them.
    opening: what the assistant itself writes before its words, so learned: a space, say, where
        the prompt ends without one.
    begin: before the first turn.
    end: after the last turn, unless the assistant is to speak next.
    preamble: the system message of conversations that have none; empty for no such.
    system_inside: write the system message inside the first user turn, before the user's words.
    trims: strip whitespace around words.
    any_model: no model's own format: it begins with `{bos}` if the tokenizer's plain text does.
    """

    user: Pair = _NOTHING
    assistant: Pair = _NOTHING
    system: Pair = _NOTHING
    tool: Pair | None = None
    opening: str = ""
    begin: str = ""
    end: str = ""
    preamble: str = ""
    system_inside: bool = False
    trims: bool = False
    any_model: bool = False


def _headers(start: str, end: str, close: str) -> ChatFormat:
    """Llama 3 and 4: a header that names the role."""

    def turn(role: str) -> Pair:
        return (f"{start}{role}{end}\n\n", close)

    return ChatFormat(turn("user"), turn("assistant"), turn("system"), begin="{bos}", trims=True)


TEMPLATES: dict[str, ChatFormat] = {
    "chatml": ChatFormat(
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        system=("<|im_start|>system\n", "<|im_end|>\n"),
    ),
    "llama2": ChatFormat(
        user=("{bos}[INST] ", " [/INST]"),
        assistant=("", " {eos}"),
        opening=" ",
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_inside=True,
        trims=True,
    ),
    "llama3": _headers("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama4": _headers("<|header_start|>", "<|header_end|>", "<|eot|>"),
    # Version 1 has no tokens for the brackets; later ones have, and need no spaces beside them.
    "mistral": ChatFormat(
        user=("[INST] ", " [/INST]"),
        system=("", "\n\n"),
        opening=" ",
        begin="{bos}",
        system_inside=True,
    ),
    "mistral_v3": ChatFormat(
        user=("[INST]", "[/INST]"), system=("", "\n\n"), begin="{bos}", system_inside=True
    ),
    "mistral_v7": ChatFormat(
        user=("[INST]", "[/INST]"),
        system=("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        begin="{bos}",
    ),
    "gemma": ChatFormat(
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
        system=("", "\n\n"),
        begin="{bos}",
        system_inside=True,
        trims=True,
    ),
    "phi3": ChatFormat(
        user=("<|user|>\n", "<|end|>\n"),
        assistant=("<|assistant|>\n", "<|end|>\n"),
        system=("<|system|>\n", "<|end|>\n"),
        end="<|endoftext|>",
    ),
    "phi4": ChatFormat(
        user=("<|im_start|>user<|im_sep|>", "<|im_end|>"),
        assistant=("<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
        system=("<|im_start|>system<|im_sep|>", "<|im_end|>"),
    ),
    "alpaca": ChatFormat(
        user=("### Instruction:\n", "\n\n### Response:\n"),
        system=("", "\n\n"),
        preamble="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        any_model=True,
    ),
    "summarize": ChatFormat(
        user=("Summarize this dialogue:\n", "\n---\nSummary:\n"), any_model=True
    ),
    "grammar": ChatFormat(
        user=("Correct this to standard English: ", "\n---\nCorrected: "), any_model=True
    ),
    "question_answer": ChatFormat(user=("Question: ", "\n\nAnswer: "), any_model=True),
}


def chat_template(template: Template | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text that `template` stands for; None is the tokenizer's own.

    Raises:
        UserError: no such template or file, a malformed mapping, or a tokenizer without a
            template or an end-of-sequence token that is needed.
    """
    if template is None:
        return _own(tokenizer)
    if isinstance(template, Mapping):
        return to_jinja(_for_tokenizer(_from_mapping(template), tokenizer))
    if isinstance(template, str):
        if template in TEMPLATES:
            return to_jinja(_for_tokenizer(TEMPLATES[template], tokenizer))
        if "{{" in template or "{%" in template:
            return template
    return _from_file(Path(template).expanduser())


def _own(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"dataset.template: the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
            f"use the instruction-tuned variant of the model, or set one of {', '.join(TEMPLATES)}"
        )
    text = tokenizer.get_chat_template()
    assert isinstance(text, str)
    return text


def _from_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        close = difflib.get_close_matches(str(path), TEMPLATES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(TEMPLATES)}"
        raise UserError(
            f"dataset.template: {str(path)!r} is no template's name, and no Jinja file that can "
            f"be read; {hint}"
        ) from error


def _from_mapping(mapping: Mapping[str, object]) -> ChatFormat:
    """`{role: [before, after]}`; roles that are left out are written without anything around."""
    pairs: dict[str, Any] = {}
    for role, pair in mapping.items():
        role = "tool" if role == "ipython" else role  # torchtune's name for it
        if role not in ("system", "user", "assistant", "tool"):
            raise UserError(
                f"dataset.template.{role}: unknown role; use system, user, assistant or tool"
            )
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(text, str) for text in pair)
        ):
            raise UserError(
                f"dataset.template.{role}: must be two texts, [before, after], not {pair!r:.60}"
            )
        pairs[role] = (pair[0], pair[1])
    return replace(ChatFormat(any_model=True), **pairs)


def _for_tokenizer(form: ChatFormat, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    form = _with_end(form)
    if "{eos}" in form.assistant[1] and tokenizer.eos_token is None:
        raise UserError(
            "dataset.template: the tokenizer has no end-of-sequence token, and the template "
            "writes nothing else after the assistant's words; add an ending to it"
        )
    if form.any_model and adds_bos(tokenizer):
        form = replace(form, begin="{bos}" + form.begin)
    return form


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins plain text with its beginning-of-sequence token."""
    return tokenizer.bos_token_id is not None and (
        tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    )


def _with_end(form: ChatFormat) -> ChatFormat:
    before, after = form.assistant
    return form if after.strip() else replace(form, assistant=(before, "{eos}" + after))


def to_jinja(form: ChatFormat) -> str:
    """The Jinja chat template of a format."""
    form = _with_end(form)
    before, after = form.assistant
    end = after.rstrip()
    roles = [
        f"{{% if message.role == 'assistant' %}}{_quote(before)}"
        f"{{% generation %}}{_quote(form.opening)}{{{{ words(message) }}}}{_quote(end)}"
        "{% endgeneration %}"
        f"{_quote(after[len(end) :])}",
        f"{{% elif message.role == 'user' %}}{_quote(form.user[0])}"
        f"{_system_within(form)}{{{{ words(message) }}}}{_quote(form.user[1])}",
    ]
    if form.system_inside:
        refused = "the system message must come first, and a user message next"
        roles.append(
            "{% elif message.role == 'system' %}{% if not loop.first or "
            f"loop.nextitem is not defined or loop.nextitem.role != 'user' %}}{_refuse(refused)}"
            "{% endif %}"
        )
    else:
        roles.append(f"{{% elif message.role == 'system' %}}{_turn(form.system)}")
    if form.tool is not None:
        roles.append(f"{{% elif message.role == 'tool' %}}{_turn(form.tool)}")
    refused = "the template has no place for the role "
    return (
        _words(form.trims)
        + _quote(form.begin)
        + _preamble(form)
        + "{% for message in messages %}"
        + "".join(roles)
        + f"{{% else %}}{_refuse(refused, 'message.role')}{{% endif %}}{{% endfor %}}"
        + f"{{% if add_generation_prompt %}}{_quote(before)}{{% else %}}{_quote(form.end)}"
        + "{% endif %}"
    )


def _words(trims: bool) -> str:
    """A macro: the text of a message; what the template cannot write is refused."""
    unwritable = "the template cannot write tool calls or reasoning; use one that can"
    return (
        "{% macro words(message) %}"
        "{% if message.tool_calls or message.reasoning_content %}"
        f"{_refuse(unwritable)}{{% endif %}}"
        "{% set parts = [] if message.content is string else message.content %}"
        "{% if parts | rejectattr('type', 'equalto', 'text') | list %}"
        f"{_refuse('the template takes text only')}{{% endif %}}"
        "{% set text = message.content if message.content is string "
        "else parts | map(attribute='text') | join %}"
        f"{{{{ text{' | trim' if trims else ''} }}}}{{% endmacro %}}"
    )


def _system_within(form: ChatFormat) -> str:
    if not form.system_inside:
        return ""
    before, after = map(_quote, form.system)
    return (
        "{% if loop.index0 == 1 and messages[0].role == 'system' %}"
        f"{before}{{{{ words(messages[0]) }}}}{after}{{% endif %}}"
    )


def _preamble(form: ChatFormat) -> str:
    if not form.preamble:
        return ""
    text = _quote(form.system[0] + form.preamble + form.system[1])
    return f"{{% if messages[0].role != 'system' %}}{text}{{% endif %}}"


def _turn(pair: Pair) -> str:
    return f"{_quote(pair[0])}{{{{ words(message) }}}}{_quote(pair[1])}"


def _quote(text: str) -> str:
    """Jinja that writes `text`, with `{bos}` and `{eos}` as the tokenizer's tokens."""
    pieces = [piece for piece in re.split(r"(\{bos\}|\{eos\})", text) if piece]
    tokens = {"{bos}": "bos_token", "{eos}": "eos_token"}
    return "".join(
        f"{{{{ {tokens.get(p) or json.dumps(p, ensure_ascii=False)} }}}}" for p in pieces
    )


def _refuse(problem: str, value: str = "") -> str:
    detail = f" ~ {value}" if value else ""
    return f"{{{{ raise_exception({json.dumps(problem)}{detail}) }}}}"
