"""Every way a row can be bad: an error that says where, or a count of what was skipped."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from graphtune.data import builders, fields, files
from graphtune.data.conversations import ConversationEncoder
from graphtune.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
GOOD: dict[str, dict[str, Any]] = {
    "instruct": {"prompt": "a", "response": "b"},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "chat": {"messages": [USER, ASSISTANT]},
    "text": {"text": "some words"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "unpaired": {"prompt": "a", "completion": "b", "label": True},
    "stepwise": {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
    "questions": {"prompt": "a", "answer": "b"},
}
LONE = "\ud800"


def messages(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


def tool(**more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": "3", **more}


def calling(function: Any) -> dict[str, Any]:
    return {**CALLING, "tool_calls": [{"type": "function", "function": function}]}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("instruct", {"promt": "a", "response": "b"}, "prompt: there is no such column; .*'promt'"),
    ("instruct", {"prompt": 3, "response": "b"}, "prompt: must be text, not 3"),
    ("instruct", {"prompt": "a", "response": None}, "response: must be text, not None"),
    ("instruct", {"prompt": "a", "response": " \n"}, "response: must not be empty"),
    ("instruct", {"prompt": "a", "response": LONE}, "response: not valid UTF-8"),
    ("instruct", {"prompt": "a", "response": []}, "response: must not be empty"),
    ("instruct", {"prompt": "a", "response": [USER]}, r"response\[1\].role: the user speaks twice"),
    ("alpaca", {"instruction": "a", "output": ""}, "output: must not be empty"),
    ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "input: must be text, not 3"),
    ("text", {"text": ""}, "text: must not be empty"),
    ("text", {"text": {"a": 1}}, "text: must be text"),
    ("chat", {"message": [USER]}, "messages: there is no such column; did you mean 'message'"),
    ("chat", {"messages": "a: b"}, "messages: must be a list of messages, not 'a: b'"),
    ("chat", {"messages": []}, "messages: must not be empty"),
    ("chat", messages(USER, "b"), r"messages\[1\]: must be a message"),
    ("chat", messages(USER, {"content": "b"}), r"messages\[1\].role: it is missing"),
    ("chat", messages(USER, {"role": "assistant"}), r"messages\[1\].content: it is missing"),
    (
        "chat",
        messages({**USER, "role": "usr"}, ASSISTANT),
        r"messages\[0\].role: 'usr' is no role; did you mean 'user'",
    ),
    (
        "chat",
        {"conversations": [{"from": "humn", "value": "a"}]},
        r"conversations\[0\].from: 'humn' is no role; did you mean 'human'",
    ),
    ("chat", messages(USER, USER, ASSISTANT), r"messages\[1\].role: the user speaks twice"),
    ("chat", messages(USER, ASSISTANT, ASSISTANT), r"messages\[2\].role: the assistant speaks tw"),
    ("chat", messages(ASSISTANT), r"messages\[0\].role: the user must speak before"),
    ("chat", messages(USER), "messages: there is no assistant's turn"),
    (
        "chat",
        messages(USER, ASSISTANT, {"role": "system", "content": "c"}),
        r"messages\[2\].role: a system message must be the first",
    ),
    ("chat", messages(USER, tool()), r"messages\[1\].role: a tool's result must follow"),
    ("chat", messages(USER, ASSISTANT, tool()), r"messages\[2\].role: a tool's result must follow"),
    ("chat", messages(USER, CALLING, tool(), tool()), r"messages\[3\].role: a tool's result"),
    (
        "chat",
        messages({**USER, "tool_calls": [3]}),
        r"messages\[0\].tool_calls: only the assistant",
    ),
    ("chat", messages(USER, calling("f")), r"messages\[1\].tool_calls\[0\].function: must have"),
    ("chat", messages(USER, calling({"nam": "f"})), r".*function.name: it is missing; .*'nam'"),
    (
        "chat",
        messages(USER, calling({"name": "f", "arguments": "{x"})),
        r"messages\[1\].tool_calls\[0\].function.arguments: not valid JSON",
    ),
    (
        "chat",
        messages(USER, {**ASSISTANT, "weight": -1}),
        r"messages\[1\].weight: must be a number",
    ),
    ("chat", messages(USER, {**ASSISTANT, "content": ""}), r"messages\[1\].content: must not be"),
    (
        "chat",
        messages({**USER, "content": [{"type": "audio"}]}),
        r".*content\[0\].type: 'audio' is",
    ),
    ("chat", {**messages(USER, ASSISTANT), "tools": "["}, "tools: not valid JSON"),
    (
        "chat",
        messages({**USER, "content": [{"type": "image"}]}, ASSISTANT),
        "images: message 0 has a place for an image",
    ),
    (
        "chat",
        {**messages({**USER, "content": "<image>"}, ASSISTANT), "images": ["x", "y"]},
        "images: there are 2 images for 1 places",
    ),
    ("preference", {"prompt": "a", "chosen": "b"}, "rejected: there is no such column"),
    ("preference", {"chosen": "b", "rejected": "c"}, "prompt: there is no such column"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected: it says the same"),
    (
        "preference",
        {"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "x"}, ASSISTANT]},
        r"rejected\[0\]: the two conversations must begin with the same prompt",
    ),
    (
        "preference",
        {"chosen": [USER, ASSISTANT], "rejected": [USER]},
        "rejected: after the prompt, it must go on with the assistant",
    ),
    ("unpaired", {"prompt": "a", "completion": "b", "label": 2}, "label: must be true or false"),
    ("stepwise", {"prompt": "a", "completions": "b", "labels": [True]}, "completions: must be a l"),
    ("stepwise", {"prompt": "a", "completions": ["b"], "labels": []}, "labels: must not be empty"),
    (
        "stepwise",
        {"prompt": "a", "completions": ["b", 3], "labels": [1, 1]},
        r"completions\[1\]: m",
    ),
    (
        "stepwise",
        {"prompt": "a", "completions": ["b"], "labels": [1, 0]},
        "labels: there are 2 for",
    ),
    ("questions", {"prompt": "a"}, "answer: there is no such column"),
    ("questions", {"prompt": "a", "answer": None}, "answer: must not be empty"),
    (
        "questions",
        {"prompt": [{**USER, "content": "<image>"}], "answer": "b", "image": "a.png"},
        r"messages\[0\].content: questions with images cannot be asked yet",
    ),
    (
        "questions",
        {"prompt": [USER, ASSISTANT], "answer": "b"},
        "prompt: it must end with the user",
    ),
]


@pytest.mark.parametrize(("builder", "row", "message"), BAD)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_row_is_an_error_or_is_skipped(
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
    builder: str,
    row: dict[str, Any],
    message: str,
    streaming: bool,
) -> None:
    build = getattr(builders, builder)
    rows = [GOOD[builder], row, GOOD[builder]]
    with pytest.raises(UserError, match=f"row 2: {message}") as info:
        list(build(tokenizer, source=rows, streaming=streaming))
    assert "\n" not in str(info.value)
    with caplog.at_level(logging.WARNING, "graphtune"):
        dataset = build(tokenizer, source=rows, streaming=streaming, on_bad_row="skip")
        assert len(list(dataset)) == 2
    assert dataset.skipped == 1
    (report,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert "row 2" in report


# Files: what cannot be parsed, beside rows that can

FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b'{"prompt": "a", "response": \n', "row: not valid JSON (Expecting value"),
    ("a.jsonl", b'["a", "b"]\n', "row: must be a JSON object"),
    ("a.jsonl", b'{"prompt": "a\xff", "response": "b"}\n', "prompt: not valid UTF-8 (at char"),
    ("a.jsonl", b'{"prompt": "a", "response": 7}\n', "response: must be text, not 7"),
    ("a.jsonl", b'{"prompt": "a"}\n', "response: "),
    ("a.json", b'{"prompt": "a", "response": {"b": 1}},\n', "response: must be text"),
    ("a.csv", b"a,b,c\n", "row: has 3 cells, but the header names 2 columns"),
    ("a.csv", b"a\n", "row: has 1 cells, but the header names 2 columns"),
    ("a.csv", b"a,\n", "response: must not be empty"),
    ("a.csv", b"a,\xff\n", "response: not valid UTF-8"),
]


def write(path: Path, bad: bytes) -> None:
    good = b"a,b\n" if path.suffix == ".csv" else b'{"prompt": "a", "response": "b"}\n'
    if path.suffix == ".json":
        path.write_bytes(b"[\n" + good.strip() + b",\n" + bad + good + b"]")
    else:
        header = b"prompt,response\n" if path.suffix == ".csv" else b""
        path.write_bytes(header + good + bad + good)


def test_text_in_parquet_that_is_no_text_is_a_bad_row_of_a_stream_too(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    column = pa.array([b"fine", b"\xff", b"good"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": ["x", "y", "z"], "response": column})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    for streaming in (False, True):
        with pytest.raises(UserError, match="a.parquet, row 2: response: not valid UTF-8"):
            list(builders.instruct(tokenizer, source=path, streaming=streaming))
        kept = builders.instruct(tokenizer, source=path, streaming=streaming, on_bad_row="skip")
        assert (len(list(kept)), kept.skipped) == (2, 1)


def test_a_bad_row_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(fields.BadRow("messages[0]", "must be kind")))
    assert (error.field, error.problem) == ("messages[0]", "must be kind")
    assert str(error) == "messages[0]: must be kind"


@pytest.mark.parametrize(("name", "bad", "problem"), FILES)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_line_names_its_file_and_row(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    name: str,
    bad: bytes,
    problem: str,
    streaming: bool,
) -> None:
    path = tmp_path / name
    write(path, bad)
    line = "" if name == "a.jsonl" else " (line 3)"
    with pytest.raises(UserError) as info:
        list(builders.instruct(tokenizer, source=path, streaming=streaming))
    assert str(info.value).startswith(f"{path}, row 2{line}: {problem}")
    dataset = builders.instruct(tokenizer, source=path, streaming=streaming, on_bad_row="skip")
    assert (len(list(dataset)), dataset.skipped) == (2, 1)


def test_a_list_that_breaks_off_is_an_error_even_where_rows_are_skipped(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a", "response": "b"},\n {"prompt": ]')
    with pytest.raises(UserError, match="row 2: row: not valid JSON .* be mended"):
        builders.instruct(tokenizer, source=path, on_bad_row="skip")


def test_rows_beyond_all_measure_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ROW_LIMIT", 1000)
    monkeypatch.setattr(fields, "ROW_LIMIT", 1000)
    rows = [GOOD["instruct"], {"prompt": "a" * 2000, "response": "b"}]
    with pytest.raises(UserError, match="row 2: prompt: has 2,000 characters; .* 1,000"):
        builders.instruct(tokenizer, source=rows)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for streaming in (False, True):
        with pytest.raises(UserError, match="a.jsonl, row 2: .* 1,000"):
            list(builders.instruct(tokenizer, source=path, streaming=streaming))
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,response\na,b\n{'a' * 2000},b\na,b\n")
    with pytest.raises(UserError, match="a.csv, row 2 .*"):
        builders.instruct(tokenizer, source=path)
    assert len(list(builders.instruct(tokenizer, source=path, on_bad_row="skip"))) == 2


def test_bad_rows_are_named_by_their_row_in_the_source(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{**GOOD["instruct"], "language": "en" if n % 2 else "de"} for n in range(10)]
    rows[7]["response"] = ""
    files = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for path, part in zip(files, (rows[:3], rows[3:]), strict=True):
        path.write_text("\n".join(map(json.dumps, part)))
    with pytest.raises(UserError, match="2.jsonl, row 5: response: must not be empty"):
        builders.instruct(tokenizer, source=files, split="train[2:]", filter={"language": "en"})
    assert len(list(builders.instruct(tokenizer, source=files, filter={"language": "de"}))) == 5


def test_the_warning_counts_and_names_the_first(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [GOOD["instruct"], *[{"prompt": "a", "response": ""}] * 5]
    with caplog.at_level(logging.WARNING, "graphtune"):
        dataset = builders.instruct(tokenizer, source=rows, on_bad_row="skip")
    assert (len(list(dataset)), dataset.skipped) == (1, 5)
    (report,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert "5 bad rows" in report and "row 4" in report and "row 5" not in report


def test_nothing_but_bad_rows_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "a", "response": ""}] * 3
    with pytest.raises(UserError, match="dataset"):
        builders.instruct(tokenizer, source=rows, on_bad_row="skip")


def test_a_well_formed_row_is_what_the_encoder_takes(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = builders.chat(tokenizer, source=[GOOD["chat"]])
    expected = ConversationEncoder(tokenizer)(GOOD["chat"]["messages"])
    assert list(example["input_ids"]) == list(expected["input_ids"])
    assert list(example["labels"]) == list(expected["labels"])
