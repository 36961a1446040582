"""The table of examples against a list of them."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphtune.data.dataset import IGNORE_INDEX, Dataset, fit, has_target
from graphtune.errors import UserError

ids = st.integers(0, 2**31 - 1)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    tokens = draw(st.lists(ids, min_size=2, max_size=8))
    labels = [IGNORE_INDEX, *tokens[1:]]
    document: dict[str, Any] = {"input_ids": tokens, "labels": labels}
    if draw(st.booleans()):
        document["weights"] = [0.5] * len(tokens)
    return document


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
extras = st.fixed_dictionaries({"label": st.booleans()}, optional={"answer.text": anything})
singles = st.builds(dict.__or__, documents(), extras)
both = st.fixed_dictionaries({name: documents() for name in ("rejected", "chosen")})
pairs = st.builds(dict.__or__, both, extras)
prompts = st.fixed_dictionaries({"prompt_ids": st.lists(ids, min_size=1, max_size=5)})
confusing = st.fixed_dictionaries({"labels": st.just([1]), "chosen": st.just({"input_ids": []})})
questions = st.builds(dict.__or__, prompts, extras | confusing)
any_kind = (
    st.lists(singles, min_size=1, max_size=12)
    | st.lists(pairs, min_size=1, max_size=12)
    | st.lists(questions, min_size=1, max_size=12)
)


def plain(value: Any) -> Any:
    """With lists in place of arrays."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def document(length: int, targets: range | None = None) -> dict[str, Any]:
    learned = range(1, length) if targets is None else targets
    tokens = list(range(length))
    return {
        "input_ids": tokens,
        "labels": [token if token in learned else IGNORE_INDEX for token in tokens],
    }


@given(any_kind, st.data())
def test_a_dataset_reads_as_the_list_it_was_made_of(
    examples: list[dict[str, Any]], data: st.DataObject
) -> None:
    dataset = Dataset.build(examples, max_length=None)
    assert [plain(example) for example in dataset] == examples
    places = data.draw(st.lists(st.integers(-len(examples), len(examples) - 1)))
    chosen = dataset.select(places)
    assert [plain(example) for example in chosen] == [examples[place] for place in places]
    step = data.draw(st.sampled_from([-2, -1, 1, 3]))
    assert [plain(example) for example in chosen[1:5:step]] == [
        examples[place] for place in places[1:5:step]
    ]
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    both = Dataset.concatenate([chosen, dataset])
    assert [plain(example) for example in both] == [*map(plain, chosen), *examples]


@given(any_kind)
def test_lengths_are_those_of_the_examples(examples: list[dict[str, Any]]) -> None:
    lengths = Dataset.build(examples, max_length=None).lengths
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [
        [len(example[name]["input_ids"]) for name in ("chosen", "rejected")]
        if "rejected" in example
        else len(example.get("prompt_ids", example.get("input_ids")))
        for example in examples
    ]


def test_an_example_is_a_view_of_the_table() -> None:
    example = Dataset.build([document(4)], max_length=None)[0]
    tokens = example["input_ids"]
    assert isinstance(tokens, np.ndarray) and tokens.dtype == np.int32
    assert tokens.base is not None and not tokens.flags.writeable


@pytest.mark.parametrize(
    ("truncate", "kept"), [("right", [0, 1, 2]), ("left", [3, 4, 5])], ids=["right", "left"]
)
def test_long_examples_are_cut_at_one_end(truncate: Any, kept: list[int]) -> None:
    long = document(6) | {"weights": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "label": True}
    dataset = Dataset.build([document(3), long], max_length=3, truncate=truncate)
    cut = plain(dataset[1])
    assert cut["input_ids"] == cut["weights"] == kept
    assert cut["label"] is True
    assert (dataset.truncated, dataset.dropped) == (1, 0)
    assert dataset[:1].truncated == 0
    both = [{"chosen": long, "rejected": document(2)}]
    pair = plain(Dataset.build(both, max_length=3, truncate=truncate)[0])
    assert pair["chosen"]["input_ids"] == kept
    assert pair["rejected"] == document(2)


@given(
    length=st.integers(2, 9),
    targets=st.integers(0, 9),
    max_length=st.integers(2, 9),
    truncate=st.sampled_from(["right", "left"]),
)
def test_what_is_kept_has_a_target(
    length: int, targets: int, max_length: int, truncate: Any
) -> None:
    """Targets at the end; the first label that is left never counts, as nothing precedes it."""
    example, _ = fit(document(length, range(length - targets, length)), max_length, truncate)
    first = max(length - targets, 1)
    end = min(length, max_length)
    expected = first < end if truncate == "right" else targets > 0
    assert (example is not None) == expected
    assert example is None or has_target(example)


def test_a_pair_needs_a_target_in_both() -> None:
    pairs = [
        {"chosen": document(2), "rejected": document(2, range(0))},
        {"chosen": document(2, range(0, 1)), "rejected": document(2)},
        {"chosen": document(2), "rejected": document(2)},
    ]
    dataset = Dataset.build(pairs, max_length=None)
    assert (len(dataset), dataset.dropped) == (1, 2)


def test_images_are_kept_whole_or_not_at_all() -> None:
    images = {"pixel_values": torch.ones(3, 2)}
    examples = [document(n) | {"images": images} for n in (2, 5)] + [document(5)]
    dataset = Dataset.build(examples, max_length=3)
    assert (len(dataset), dataset.truncated, dataset.dropped) == (2, 1, 1)
    assert dataset[0]["images"] is images
    assert "images" not in dataset[1]
    assert pickle.loads(pickle.dumps(dataset))[0]["images"]["pixel_values"].shape == (3, 2)


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(UserError, match="dataset: it holds no examples"):
        Dataset.build([], max_length=None)
    with pytest.raises(UserError, match="dataset.max_length: 3 leaves nothing to train on"):
        Dataset.build([document(6, range(4, 6))], max_length=3)
    with pytest.raises(UserError, match="dataset.max_length: 1 is too short"):
        Dataset.build([document(6)], max_length=1)
    with pytest.raises(ValueError, match="as many labels"):
        Dataset.build([document(6) | {"labels": [1, 2]}], max_length=None)
    with pytest.raises(UserError, match="columns file must hold text, .* not PosixPath"):
        Dataset.build([document(6) | {"file": Path("x")}], max_length=None)
    question = Dataset.build([{"prompt_ids": [1]}], max_length=None)
    with pytest.raises(UserError, match="different kinds .* prompt_ids and input_ids"):
        Dataset.concatenate([question, Dataset.build([document(2)], max_length=None)])
    with pytest.raises(IndexError):
        question[1]
    with pytest.raises(IndexError):
        question.select([1])
