"""Plain text, whole or cut into pieces that lose nothing."""

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from graphtune.data import IGNORE_INDEX, Dataset
from graphtune.data.builders import (
    text,
)
from graphtune.data.table import cuts
from graphtune.errors import UserError


def whole(tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any]) -> str:
    return str(tokenizer.decode(list(example["input_ids"])))


def plain(examples: Any) -> list[tuple[list[int], list[int]]]:
    return [(list(map(int, e["input_ids"])), list(map(int, e["labels"]))) for e in examples]


def test_text_is_learned_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer.encode("some words", add_special_tokens=False)
    ((found, labels),) = plain(text(tokenizer, source=[{"text": "some words"}]))
    assert (found, labels) == ([bos, *ids, eos], [IGNORE_INDEX, *ids, eos])
    rows = [{"body": "some words"}]
    ((found, _),) = plain(text(tokenizer, source=rows, column="body", add_eos=False))
    assert found == [bos, *ids]


@given(size=st.integers(1, 200), length=st.integers(4, 50))
def test_cuts_leave_no_single_token(size: int, length: int) -> None:
    edges = cuts(size, length)
    assert (edges[0], edges[-1]) == (0, size)
    sizes = [end - start for start, end in zip(edges, edges[1:], strict=False)]
    assert max(sizes) <= length
    assert size == 1 or min(sizes) >= 2
    assert len(sizes) == -(-size // length)


DOCUMENTS = [{"text": "abcdefghijk" * n + "x" * m} for n, m in [(1, 0), (5, 3), (0, 2), (9, 1)]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("length", [5, 8, 13])
def test_long_documents_are_split_without_loss(
    tokenizer: PreTrainedTokenizerBase, streaming: bool, length: int
) -> None:
    documents = plain(text(tokenizer, source=DOCUMENTS))
    pieces = plain(text(tokenizer, source=DOCUMENTS, max_length=length, streaming=streaming))
    expected = [
        (ids[start:end], labels[start:end])
        for ids, labels in documents
        for edges in [cuts(len(ids), length)]
        for start, end in zip(edges, edges[1:], strict=False)
    ]
    assert pieces == expected
    dataset = text(tokenizer, source=DOCUMENTS, max_length=length, overflow="cut")
    assert plain(dataset) == [(ids[:length], labels[:length]) for ids, labels in documents]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=6), st.integers(4, 12))
def test_a_table_is_cut_where_a_stream_is(sizes: list[int], length: int) -> None:
    examples = [{"input_ids": [0, *range(1, n)], "labels": [-100, *range(1, n)]} for n in sizes]
    expected = [
        (example["input_ids"][start:end], example["labels"][start:end])
        for example in examples
        for edges in [cuts(len(example["input_ids"]), length)]
        for start, end in pairwise(edges)
    ]
    assert plain(Dataset.build(examples, max_length=None).in_pieces(length)) == expected


def test_split_documents_know_their_lengths(tokenizer: PreTrainedTokenizerBase) -> None:
    dataset: Any = text(tokenizer, source=DOCUMENTS, max_length=7)
    assert dataset.lengths.tolist() == [len(example["input_ids"]) for example in dataset]
    assert (dataset.truncated, dataset.dropped, dataset.skipped) == (0, 0, 0)
    with pytest.raises(UserError, match="dataset.max_length: 3 is too short to split"):
        text(tokenizer, source=DOCUMENTS, max_length=3)


def test_a_stream_of_pieces_goes_on_where_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    def stream() -> Any:
        made: Any = text(tokenizer, source=DOCUMENTS * 2, max_length=8, streaming=True)
        return made

    one = stream()
    expected = [plain(one), plain(one)]  # two epochs
    assert expected[0] == expected[1] != []
    for cut in range(len(expected[0]) + 1):
        first, second = stream(), stream()
        reading: Iterator[Any] = iter(first)
        head = plain(next(reading) for _ in range(cut))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = plain(second)
        assert head + rest == expected[0]
        assert plain(second) == expected[1]


def test_text_options_are_checked(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="dataset.overflow: 'drop' is unknown"):
        text(tokenizer, source=DOCUMENTS, overflow="drop")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="dataset.template: text has no such option"):
        text(tokenizer, source=DOCUMENTS, template="chatml")  # type: ignore[call-arg]
