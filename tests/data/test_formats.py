"""Formats: what the columns of common data sets mean."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphtune.data import formats
from graphtune.data.fields import BadRow
from graphtune.data.messages import Message, check_conversation

WORDS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@st.composite
def conversations(draw: st.DrawFn) -> list[Any]:
    """Well-formed ones: a system message or none, then turns, some of which call tools."""
    messages = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(WORDS)))
        if draw(st.booleans()):
            arguments = draw(st.dictionaries(WORDS, st.integers() | WORDS, max_size=2))
            call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
            messages.append(assistant(None, tool_calls=[call]))
            messages.append({"role": "tool", "content": draw(WORDS)})
        messages.append(assistant(draw(WORDS)))
    return messages


def to_sharegpt(messages: list[Any]) -> list[dict[str, str]]:
    """As LLaMA-Factory and others write tool calls: JSON text of name and arguments."""
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    return [
        {"from": "function_call", "value": json.dumps(m["tool_calls"][0]["function"])}
        if m.get("tool_calls")
        else {"from": names[m["role"]], "value": m["content"]}
        for m in messages
    ]


def to_openai(messages: list[Any]) -> list[dict[str, Any]]:
    """As its API has them, in a table that has every key in every row."""
    keys = {"tool_calls": None, "tool_call_id": None, "name": None, "weight": None}
    rows: list[dict[str, Any]] = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(arguments)}}
            for call in message.get("tool_calls", [])
            for arguments in [call["function"]["arguments"]]
        ]
        rows.append({**keys, **message, "tool_calls": calls or None})
    return rows


@given(conversations())
def test_openai_and_sharegpt_say_the_same(messages: list[Any]) -> None:
    assert formats.chat({"messages": messages}) == messages
    assert formats.chat({"messages": to_openai(messages)}) == messages
    assert formats.chat({"conversations": to_sharegpt(messages)}) == messages


@given(conversations(), WORDS)
def test_a_given_system_message_replaces_the_rows_own(messages: list[Any], system: str) -> None:
    rest = [message for message in messages if message["role"] != "system"]
    leading = [{"role": "system", "content": system}]
    assert formats.chat({"messages": messages}, system=system) == leading + rest
    found = formats.chat({"conversations": to_sharegpt(messages), "system": system})
    assert found == (messages if messages[0]["role"] == "system" else leading + rest)


def test_all_that_a_message_can_have() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        user([{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 2?"}]),
        assistant("", reasoning_content="I add.", tool_calls=[{**CALL, "id": "c1"}], weight=0),
        {"role": "function", "content": "3", "tool_call_id": "c1", "name": "add"},
        assistant("3", weight=0.5),
        user("And now?"),
        assistant(None, function_call={"name": "add", "arguments": "{}"}),
        {"role": "tool", "content": ""},
        assistant("0", thinking="So."),
    ]
    assert formats.chat({"messages": messages}) == [
        {"role": "system", "content": "Be brief."},
        user("What is 1 + 2?"),
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I add.",
            "tool_calls": [
                {"type": "function", "id": "c1", "function": CALL["function"]},
            ],
            "weight": 0.0,
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
        assistant("3", weight=0.5),
        user("And now?"),
        assistant(
            None, tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {}}}]
        ),
        {"role": "tool", "content": ""},
        assistant("0", reasoning_content="So."),
    ]


def test_calls_in_the_text_are_answered_too() -> None:
    messages = [
        user("1 + 2?"),
        assistant('<tool_call>\n{"name": "add"}\n</tool_call>'),
        {"role": "tool", "content": "3"},
        assistant("3"),
    ]
    assert formats.chat({"messages": messages}) == messages


def test_parallel_calls_are_answered_in_any_order() -> None:
    calls = [{**CALL, "id": id} for id in ("x", "y")]
    results = [{"role": "tool", "content": "3", "tool_call_id": id} for id in ("y", "x")]
    formats.chat({"messages": [user("?"), assistant(None, tool_calls=calls), *results]})
    with pytest.raises(BadRow, match=r"messages\[3\].tool_call_id: 'z' is no call"):
        results[1]["tool_call_id"] = "z"
        formats.chat({"messages": [user("?"), assistant(None, tool_calls=calls), *results]})


# Prompts and answers


def test_alpaca() -> None:
    row = {"instruction": "Add one.", "input": "41", "output": "42"}
    assert formats.alpaca(row) == [user("Add one.\n\n41"), assistant("42")]
    for empty in ("", None):
        assert formats.alpaca({**row, "input": empty})[0] == user("Add one.")
    assert formats.alpaca({"instruction": "a", "output": "b"}, system="c") == [
        {"role": "system", "content": "c"},
        user("a"),
        assistant("b"),
    ]


def test_instruct_takes_texts_and_lists_of_messages() -> None:
    expected = [user("a"), assistant("b")]
    assert formats.instruct({"prompt": "a", "response": "b"}) == expected
    assert formats.instruct({"prompt": "a", "completion": "b"}) == expected
    columns = {"prompt_column": "q", "response_column": "a"}
    assert formats.instruct({"q": "a", "a": "b"}, **columns) == expected
    prompt = [user("x"), assistant("y"), user("z")]
    found = formats.instruct({"prompt": prompt, "completion": [assistant("b"), user("c")]})
    assert found == [*({**m, "weight": 0.0} for m in prompt), assistant("b"), user("c")]


def test_a_system_column_may_be_empty() -> None:
    row = {"prompt": "a", "response": "b", "s": "mine"}
    assert formats.instruct(row, system_column="s", system="c")[0]["content"] == "mine"
    row["s"] = ""
    assert formats.instruct(row, system_column="s", system="c")[0]["content"] == "c"
    assert formats.instruct(row, system_column="s")[0] == user("a")


@given(conversations(), WORDS, WORDS)
def test_a_shared_prompt_is_what_both_begin_with(
    prompt: list[Any], chosen: str, rejected: str
) -> None:
    shared = [*prompt, user("?")]
    row = {"chosen": [*shared, assistant(chosen)], "rejected": [*shared, assistant(rejected)]}
    if chosen == rejected:
        with pytest.raises(BadRow, match="rejected: it says the same as `chosen`"):
            formats.preference(row)
        return
    explicit = {"prompt": shared, "chosen": chosen, "rejected": [assistant(rejected)]}
    pair = formats.preference(row)
    assert pair == (shared, [assistant(chosen)], [assistant(rejected)])
    assert formats.preference(explicit) == pair
    # As hub data sets often repeat it, of which only the conversations count.
    assert formats.preference({**row, "prompt": "?"}) == pair


def test_answers_may_go_on_for_different_numbers_of_turns() -> None:
    longer = [user("a"), assistant("b"), user("c"), assistant("d")]
    pair = formats.preference({"chosen": longer, "rejected": [user("a"), assistant("x")]})
    assert pair == ([user("a")], longer[1:], [assistant("x")])
    row = {"prompt": "a", "chosen": assistant("b"), "rejected": "c"}
    assert formats.preference(row) == ([user("a")], [assistant("b")], [assistant("c")])


@pytest.mark.parametrize("label", [True, False])
def test_unpaired(label: bool) -> None:
    expected = ([user("a")], [assistant("b")], label)
    for written in (label, int(label), str(label), str(label).lower(), str(int(label))):
        assert formats.unpaired({"prompt": "a", "completion": "b", "label": written}) == expected


def test_stepwise() -> None:
    row = {"prompt": "a", "completions": ["b", "c"], "labels": [True, 0]}
    assert formats.stepwise(row) == ("a", ["b", "c"], [True, False])


def test_questions_keep_the_other_columns() -> None:
    row = {"prompt": "2 + 2?", "answer": "#### 4", "level": 1}
    assert formats.question(row) == ([user("2 + 2?")], {"answer": "#### 4", "level": 1})
    prompt = [{"role": "system", "content": "s"}, user("a")]
    assert formats.question({"prompt": prompt}, answer_column=None) == (prompt, {})


def test_tools() -> None:
    schema = {"type": "function", "function": {"name": "f"}}
    assert formats.tools({"tools": [schema]}) == [schema]
    assert formats.tools({"tools": json.dumps([schema])}) == [schema]
    assert formats.tools({}) is formats.tools({"tools": None}) is None
    with pytest.raises(BadRow, match="tools: must be a list"):
        formats.tools({"tools": [3]})


# Images


def image(reference: Any) -> dict[str, Any]:
    return {"type": "image", "image": reference}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def test_images_fill_parts_and_tags_in_order() -> None:
    hole = {"type": "image", "image": None}
    messages = [user([hole, words("and"), hole]), assistant("b"), user([hole]), assistant("d")]
    found = formats.chat({"messages": messages, "images": [1, 2, 3]})
    assert found[0]["content"] == [image(1), words("and"), image(2)]
    assert found[2]["content"] == [image(3)]
    tagged = [user("<image>\nwhat? <image>"), assistant("a <image>")]
    found = formats.chat({"messages": tagged, "images": ["x.png", "y.png"]})
    assert found[0]["content"] == [image("x.png"), words("\nwhat? "), image("y.png")]
    assert found[1] == assistant("a <image>")  # what a model says holds no image
    assert formats.chat({"messages": tagged}) == tagged
    shown = [user("what?"), assistant("a")]
    found = formats.chat({"messages": shown, "pic": "x.png"}, images_column="pic")
    assert found == [user([image("x.png"), words("what?")]), assistant("a")]


def test_images_of_openai() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
        {"type": "image", "url": "z.png", "text": None},
        words("?"),
    ]
    found = formats.chat({"messages": [user(parts), assistant("a")]})
    assert found[0]["content"] == [image("https://x/y.png"), image("z.png"), words("?")]


def test_other_formats_take_images_in_the_prompt() -> None:
    expected = [user([image("x"), words("a")])]
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x"]}
    assert formats.preference(row).prompt == expected
    assert formats.instruct({"prompt": "a", "response": "b", "image": "x"})[0] == expected[0]


# The order of turns


@given(st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=6))
def test_conversations_are_of_a_fixed_form(roles: list[Any]) -> None:
    """Against a regular expression: tools answer one call each, in the same breath."""
    letters = "".join(role[0] for role in roles)
    messages = [Message(role=role, content="x") for role in roles]
    for message in messages:
        if message["role"] == "assistant":
            message["tool_calls"] = [CALL, CALL]
    form = re.fullmatch(r"s?(u(at{0,2}(at{0,2})*)?)*", letters)
    right = form and "uu" not in letters and "aa" not in letters and "a" in letters
    try:
        check_conversation(messages)
    except BadRow:
        assert not right
    else:
        assert right
