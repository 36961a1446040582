"""Sources: files, lists, the standard library's texts."""

import csv
import json
import time
from pathlib import Path

import pytest
from datasets import Dataset as Table
from transformers import PreTrainedTokenizerBase

from graphtune.data import IGNORE_INDEX, Dataset, Example, alpaca, chat, instruct, pydoc_topics
from graphtune.errors import UserError

ROWS = [{"prompt": f"What is {n} + 1?", "response": str(n + 1)} for n in range(5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def answers(tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> list[str]:
    return [
        tokenizer.decode([label for label in example["labels"] if label != IGNORE_INDEX])
        for example in dataset
    ]


def write(rows: list[dict[str, str]], path: Path) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        Table.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_files_read_as_lists_do(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"rows{suffix}"
    write(ROWS, path)
    expected = instruct(tokenizer, source=ROWS)
    assert answers(tokenizer, expected) == [f"{n + 1}<|im_end|>" for n in range(5)]
    assert instruct(tokenizer, source=path) == expected
    assert instruct(tokenizer, source=str(path), split="train[:40%]") == expected[:2]


def test_csv_files_and_other_columns(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    write([{"q": "Hi", "a": "Hello, you"}], tmp_path / "rows.csv")
    dataset = instruct(
        tokenizer, source=tmp_path / "rows.csv", prompt_column="q", response_column="a"
    )
    assert answers(tokenizer, dataset) == ["Hello, you<|im_end|>"]


def test_system_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = instruct(tokenizer, source=ROWS[:1], system="Be exact.")
    assert tokenizer.decode(example["input_ids"]).startswith("<|im_start|>system\nBe exact.")


def test_alpaca_joins_instruction_and_input(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        {"instruction": "Add one.", "input": "41", "output": "42"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    dataset = alpaca(tokenizer, source=rows)
    assert answers(tokenizer, dataset) == ["42<|im_end|>", "hi<|im_end|>"]
    texts = [tokenizer.decode(example["input_ids"]) for example in dataset]
    assert "user\nAdd one.\n\n41<|im_end|>" in texts[0]
    assert "user\nSay hi.<|im_end|>" in texts[1]


def test_chat_trains_every_answer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    messages = [
        {"role": role, "content": text}
        for role, text in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    assert answers(tokenizer, chat(tokenizer, source=path)) == ["b<|im_end|>d<|im_end|>"]


def test_long_examples_are_cut_but_never_without_something_to_train() -> None:
    def example(prompt: int, answer: int) -> Example:
        ids = list(range(prompt + answer))
        return Example(input_ids=ids, labels=[IGNORE_INDEX] * prompt + ids[prompt:])

    examples = [example(3, 2), example(3, 10), example(9, 3), example(7, 5), example(0, 8)]
    dataset = Dataset.build(examples, max_length=8)
    assert [e["input_ids"] for e in dataset] == [list(range(n)) for n in (5, 8, 8, 8)]
    assert [len(e["labels"]) for e in dataset] == [5, 8, 8, 8]
    assert dataset[2]["labels"] == [IGNORE_INDEX] * 7 + [7]
    assert (dataset.truncated, dataset.dropped) == (3, 1)


def test_topics_are_prose_with_every_token_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = pydoc_topics(tokenizer, max_length=64, limit=20)
    assert len(dataset) == 20
    for example in dataset:
        assert 16 <= len(example["input_ids"]) <= 64
        assert example["input_ids"][0] == tokenizer.bos_token_id
        assert example["labels"] == [IGNORE_INDEX, *example["input_ids"][1:]]
    text = "".join(
        tokenizer.decode(example["input_ids"][1:]) for example in pydoc_topics(tokenizer)
    )
    assert 'The "assert" statement' in text
    assert len(text) > 300_000


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "dataset: it holds no examples"),
        ([{"promt": "a", "response": "b"}], "dataset.prompt_column: .*did you mean 'promt'"),
        ([{"prompt": "a", "response": None}], r"dataset.response_column: .*None \(row 0\)"),
        ([*ROWS, {"prompt": 3, "response": "b"}], r"dataset.prompt_column: .*3 \(row 5\)"),
        ("/no/such/file.jsonl", "dataset.source: there is no file '/no/such/file.jsonl'"),
        ("no-such-owner/no-such-data", "dataset.source: .*'no-such-owner/no-such-data'"),
    ],
)
def test_bad_sources_are_refused_quickly(
    tokenizer: PreTrainedTokenizerBase, source: object, message: str
) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as info:
        instruct(tokenizer, source=source)
    assert "\n" not in str(info.value)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("content", ["", "{not json"])
def test_empty_and_damaged_files_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="dataset.source: cannot read split 'train' of"):
        instruct(tokenizer, source=path)


def test_an_unknown_split_and_a_short_length_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write(ROWS, tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="dataset.source: cannot read split 'tset'"):
        instruct(tokenizer, source=tmp_path / "rows.jsonl", split="tset")
    with pytest.raises(UserError, match="dataset.max_length: 5 leaves nothing"):
        instruct(tokenizer, source=ROWS, max_length=5)
    with pytest.raises(UserError, match="dataset.max_length: 1 is too short"):
        instruct(tokenizer, source=ROWS, max_length=1)
