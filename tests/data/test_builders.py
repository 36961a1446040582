"""Builders: what configs name, from rows to examples."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from graphtune.config import Component
from graphtune.data import IGNORE_INDEX, builders, catalog, pydoc_topics
from graphtune.data.builders import (
    alpaca,
    chat,
    instruct,
    preference,
    questions,
    stepwise,
    unpaired,
)
from graphtune.data.conversations import ConversationEncoder
from graphtune.errors import UserError

ROWS = [{"prompt": f"What is {n} + 1?", "response": str(n + 1)} for n in range(5)]


def learned(tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any]) -> str:
    return str(tokenizer.decode([label for label in example["labels"] if label != IGNORE_INDEX]))


def whole(tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any]) -> str:
    return str(tokenizer.decode(list(example["input_ids"])))


def plain(examples: Any) -> list[tuple[list[int], list[int]]]:
    return [(list(map(int, e["input_ids"])), list(map(int, e["labels"]))) for e in examples]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_files_give_what_lists_do(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, suffix: str
) -> None:
    from datasets import Dataset as Table

    path = tmp_path / f"rows.{suffix}"
    table = Table.from_list(ROWS)
    {
        "json": lambda: path.write_text(json.dumps(ROWS)),
        "jsonl": lambda: table.to_json(path),
        "csv": lambda: table.to_csv(path),
        "parquet": lambda: table.to_parquet(path),
    }[suffix]()
    expected = plain(instruct(tokenizer, source=ROWS))
    assert plain(instruct(tokenizer, source=path)) == expected
    assert plain(instruct(tokenizer, source=path, streaming=True)) == expected
    assert plain(instruct(tokenizer, source=str(path), split="train[:40%]")) == expected[:2]


def test_answers_are_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = instruct(tokenizer, source=ROWS)
    assert [learned(tokenizer, e) for e in dataset] == [f"{n + 1}<|im_end|>" for n in range(5)]
    (example,) = instruct(tokenizer, source=ROWS[:1], system="Be exact.")
    assert whole(tokenizer, example).startswith("<|im_start|>system\nBe exact.")
    rows = [{"instruction": "Add one.", "input": "41", "output": "42"}]
    (example,) = alpaca(tokenizer, source=rows)
    assert "user\nAdd one.\n\n41<|im_end|>" in whole(tokenizer, example)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": words} for role, words in turns]}
    (example,) = chat(tokenizer, source=[row])
    assert learned(tokenizer, example) == "b<|im_end|>d<|im_end|>"
    (example,) = chat(tokenizer, source=[row], train_on="last")
    assert learned(tokenizer, example) == "d<|im_end|>"


def test_a_prompt_of_messages_is_never_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    prompt = [{"role": role, "content": words} for role, words in turns]
    (example,) = instruct(tokenizer, source=[{"prompt": prompt, "completion": "d"}])
    assert learned(tokenizer, example) == "d<|im_end|>"


def test_templates_are_passed_on(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"dialogue": "A: hi", "summary": "A greets."}]
    (example,) = catalog.samsum(tokenizer, source=rows)
    shown = whole(tokenizer, example)
    assert "Summarize this dialogue:\nA: hi\n---\nSummary:\nA greets." in shown
    assert learned(tokenizer, example).startswith("A greets.")


def test_a_tools_column_is_shown_to_the_model(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{{ tools[0].name if tools else 'none' }}:" + str(tokenizer.chat_template)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [{**row, "tools": [{"name": "mine"}]}, {**row, "tools": None}]
    found = chat(tokenizer, source=rows, template=template, tools=[{"name": "ours"}])
    assert [whole(tokenizer, e).split(":")[0] for e in found] == ["mine", "ours"]
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"name": "mine"}]}
    found = preference(tokenizer, source=[pair], template=template)
    texts = [whole(tokenizer, answer) for example in found for answer in example.values()]
    judged = {"prompt": "a", "completion": "b", "label": 1, "tools": [{"name": "mine"}]}
    texts += [whole(tokenizer, e) for e in unpaired(tokenizer, source=[judged], template=template)]
    assert [text.split(":")[0] for text in texts] == ["mine"] * 3


# Preferences


@pytest.mark.parametrize("shared", [False, True])
def test_pairs_share_their_prompt(tokenizer: PreTrainedTokenizerBase, shared: bool) -> None:
    turns = [("user", "What?"), ("assistant", "This."), ("user", "And?")]
    prompt: Any = [{"role": role, "content": words} for role, words in turns]
    row: dict[str, Any] = {"prompt": prompt, "chosen": "Good.", "rejected": "Bad one."}
    if shared:
        row = {
            key: [*prompt, {"role": "assistant", "content": row[key]}]
            for key in ("chosen", "rejected")
        }
    pair: Any
    (pair,) = preference(tokenizer, source=[row])
    encode = ConversationEncoder(tokenizer, train_on="last")
    for key, words in (("chosen", "Good."), ("rejected", "Bad one.")):
        expected = encode([*prompt, {"role": "assistant", "content": words}])
        assert plain([pair[key]]) == plain([expected])
        assert learned(tokenizer, pair[key]) == f"{words}<|im_end|>"
    starts = [
        next(i for i, label in enumerate(pair[key]["labels"]) if label != IGNORE_INDEX)
        for key in ("chosen", "rejected")
    ]
    assert starts[0] == starts[1]
    chosen, rejected = (list(pair[key]["input_ids"][: starts[0]]) for key in pair)
    assert chosen == rejected


def test_unpaired_examples_have_a_label(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    dataset: Any = builders.unpaired(tokenizer, source=rows)
    assert [example["label"] for example in dataset] == [True, False]
    assert [learned(tokenizer, example) for example in dataset] == ["b<|im_end|>"] * 2


def tokenize_as_trl(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], separator: str, last_only: bool
) -> tuple[list[int], list[int]]:
    """What TRL's PRMTrainer (0.12 to 0.29) makes of a row, by its description."""
    ids, labels = [], []
    for i, (step, label) in enumerate(zip(row["completions"], row["labels"], strict=True)):
        tokens = tokenizer.encode(step, add_special_tokens=False)
        tokens += tokenizer.encode(separator, add_special_tokens=False)
        shown = not last_only or i == len(row["completions"]) - 1
        ids += tokens
        labels += [-100] * (len(tokens) - 1) + [int(label) if shown else -100]
    prompt = [tokenizer.bos_token_id, *tokenizer.encode(row["prompt"], add_special_tokens=False)]
    return prompt + ids, [-100] * len(prompt) + labels


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("separator", ["\n", " and then "])
def test_steps_are_labelled_at_their_ends(
    tokenizer: PreTrainedTokenizerBase, separator: str, last_only: bool
) -> None:
    row = {"prompt": "2+2?", "completions": ["Two,", "two:", "five"], "labels": [True, 1, False]}
    found = stepwise(tokenizer, source=[row], separator=separator, last_step_only=last_only)
    assert plain(found) == [tokenize_as_trl(tokenizer, row, separator, last_only)]
    with pytest.raises(UserError, match="dataset.separator: ''"):
        stepwise(tokenizer, source=[row], separator="")


def test_questions_are_what_generation_sees(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"question": "2 + 2?", "answer": "4", "level": 1, "tags": ["a"], "prompt": "x"}]
    (example,) = questions(tokenizer, source=rows, prompt_column="question", system="Think.")
    expected = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 2?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(example.pop("prompt_ids")) == expected  # type: ignore[typeddict-item]
    assert example == {"answer": "4", "level": 1, "tags": ["a"], "prompt": "x"}
    with pytest.raises(UserError, match="row 1: prompt_ids: .* rename the column"):
        questions(tokenizer, source=[{"prompt": "a", "answer": "b", "prompt_ids": 1}])


# Plain text


def test_topics_are_prose_with_every_token_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = pydoc_topics(tokenizer, max_length=64, limit=20)
    assert len(dataset) == 20
    for example in dataset:
        ids = list(example["input_ids"])
        assert 16 <= len(ids) <= 64
        assert ids[0] == tokenizer.bos_token_id
        assert list(example["labels"]) == [IGNORE_INDEX, *ids[1:]]
    pieces = [str(tokenizer.decode(list(e["input_ids"][1:]))) for e in pydoc_topics(tokenizer)]
    assert 'The "assert" statement' in "".join(pieces)
    assert len("".join(pieces)) > 300_000


# Options


def test_examples_are_kept_until_something_changes(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = ConversationEncoder.__call__

    def counted(self: ConversationEncoder, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ConversationEncoder, "__call__", counted)

    def new(builder: Any, **options: Any) -> bool:
        calls.clear()
        builder(tokenizer, **{"source": ROWS, "workers": 1, **options})
        return bool(calls)

    assert new(instruct) and not new(instruct)
    for options in (
        {"system": "x"},
        {"template": "chatml"},
        {"train_on": "all"},
        {"source": ROWS[:4]},
        {"validation": 0.8},
        {"response_column": "prompt"},
        {"tools": [{"name": "x"}]},
        {"max_length": 64},
    ):
        assert new(instruct, **options), options
        assert not new(instruct, **options), options


@pytest.mark.parametrize("name", ["instruct", "alpaca", "chat", "text", "preference", "unpaired"])
def test_an_unknown_option_is_refused_in_python_and_in_configs(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    with pytest.raises(UserError, match="dataset.max_lenght: .*; did you mean 'max_length'"):
        getattr(builders, name)(tokenizer, source=ROWS, max_lenght=3)
    component = Component(f"graphtune.data.builders.{name}", {"max_lenght": 3}, "dataset")
    with pytest.raises(UserError, match="`dataset.max_lenght`: .*did you mean `max_length`"):
        component.check()
    Component(f"graphtune.data.builders.{name}", {"validation": 0.1}, "dataset").check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "everything"}, "dataset.train_on: 'everything'"),
        ({"template": "chatlm"}, "dataset.template: 'chatlm' .* 'chatml'"),
        ({"truncate": "middle"}, "dataset.truncate: 'middle'"),
        ({"workers": 0}, "dataset.workers: 0"),
        ({"max_length": 1}, "dataset.max_length: 1 is too short"),
        ({"max_length": 5}, "dataset.max_length: 5 leaves nothing"),
        ({"image_dir": "x"}, "dataset.image_dir: the model takes no images"),
        ({"source": "/no/such/file.jsonl"}, "dataset.source: there is no file '/no/such"),
        ({"source": "no-such-owner/no-such-data"}, "dataset.source: .*'no-such-owner/no-such"),
    ],
)
def test_bad_options_are_refused_quickly(
    tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], message: str
) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as info:
        instruct(tokenizer, **{"source": ROWS, **options})
    assert "\n" not in str(info.value)
    assert time.monotonic() - start < 10


# The catalog

CATALOG: dict[str, Mapping[str, Any]] = {
    "alpaca_cleaned": {"instruction": "a", "input": "", "output": "b"},
    "grammar": {"input": "a", "output": "b"},
    "samsum": {"id": 1, "dialogue": "a", "summary": "b"},
    "slimorca": {
        "conversations": [
            {"from": "human", "value": "a", "weight": None},
            {"from": "gpt", "value": "b", "weight": 1.0},
        ]
    },
    "hh_rlhf_helpful": {
        key: [{"role": "user", "content": "a"}, {"role": "assistant", "content": key}]
        for key in ("chosen", "rejected")
    },
    "stack_exchange_paired": {"question": "a", "response_j": "b", "response_k": "c"},
    "cnn_dailymail": {"article": "a b", "highlights": "c", "id": "1"},
    "wikitext": {"page": "a b"},
    "gsm8k": {"question": "a", "answer": "b #### 4"},
}


@pytest.mark.parametrize("name", CATALOG)
def test_the_catalog_knows_its_columns(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    row = CATALOG[name]
    options = {"name": None, "data_dir": None} if name != "alpaca_cleaned" else {}
    known: Sequence[Any] = list(getattr(catalog, name)(tokenizer, source=[row] * 2, **options))
    assert len(known) == 2
    Component(f"graphtune.data.catalog.{name}", {"split": "test", "max_length": 9}).check()


def test_the_default_alpaca_skips_its_empty_rows(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": "a", "output": output} for output in ("b", "")]
    monkeypatch.setattr(builders, "ALPACA", rows)
    assert len(alpaca(tokenizer, source=rows)) == 1  # type: ignore[arg-type]
    with pytest.raises(UserError, match="row 2: output: must not be empty"):
        alpaca(tokenizer, source=rows, on_bad_row="error")


def test_a_model_that_takes_images_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Encoder:
        key = "key"

        def __init__(self, processor: Any, **options: Any) -> None:
            seen.append(options)

        def __call__(self, messages: Any, tools: Any) -> Any:
            seen.append(messages)
            return {"input_ids": [1, 2], "labels": [1, 2]}

    class Processor:
        image_processor = None

    monkeypatch.setattr("graphtune.data.vision.VisionEncoder", Encoder)
    turns = [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}]
    chat(Processor(), source=[{"messages": turns, "image": "x.png"}], image_dir="y", workers=1)  # type: ignore[arg-type]
    parts = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "a"}]
    assert seen == [{"image_dir": "y"}, [{"role": "user", "content": parts}, turns[1]]]
