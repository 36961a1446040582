"""Batches against brute force, and against each document on its own."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphtune as gt
from graphtune.data.batching import Batching, Mode, plan
from graphtune.data.collation import (
    Batch,
    _mask_by_distance,
    attention_mask,
    collate,
    collate_examples,
    collate_packed,
    collate_questions,
    complete,
    count_tokens,
    lay_out,
    without_targets,
)
from graphtune.data.dataset import IGNORE_INDEX
from graphtune.data.loader import collate_planned, example_lengths
from graphtune.errors import UserError
from graphtune.losses import cross_entropy, labelled_tokens
from graphtune.training.evaluate import evaluate_loss
from tests.oracles.models import VOCAB, tiny_model

PAD = 7
sizes = st.lists(st.integers(1, 6), max_size=3)
rows_of_sizes = st.lists(sizes, min_size=1, max_size=4)


def document(number: int, size: int, **others: Any) -> dict[str, Any]:
    """Tokens are all different: document and place can be read off a token."""
    tokens = [1000 * (number + 1) + place for place in range(size)]
    return {"input_ids": tokens, "labels": list(tokens), **others}


def make(rows: list[list[int]]) -> list[list[dict[str, Any]]]:
    numbers = iter(range(100))
    return [[document(next(numbers), size) for size in row] for row in rows]


def check(batch: Batch, rows: list[list[dict[str, Any]]], length: int) -> None:
    """Every entry of a batch, one by one."""
    assert batch["attention_mask"].shape == (len(rows), 1, length, length)
    assert batch["attention_mask"].dtype == torch.bool
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].shape == (len(rows), length) and batch[name].dtype == torch.int64
    for row, documents in enumerate(rows):
        tokens = [token for one in documents for token in one["input_ids"]]
        tokens += [PAD] * (length - len(tokens))
        assert batch["input_ids"][row].tolist() == tokens
        for query, token in enumerate(tokens):
            first = token == PAD or token % 1000 == 0
            assert batch["labels"][row, query] == (IGNORE_INDEX if first else token)
            assert batch["position_ids"][row, query] == (0 if first else token % 1000)
        for query, key in product(range(length), repeat=2):
            same = tokens[query] != PAD and tokens[query] // 1000 == tokens[key] // 1000
            expected = (same and key <= query) or key == query
            assert batch["attention_mask"][row, 0, query, key].item() == expected


@settings(max_examples=30, deadline=None)
@given(sizes=rows_of_sizes)
def test_rows_hold_their_documents_apart_from_each_other(sizes: list[list[int]]) -> None:
    check(collate_packed(make(sizes), 19, PAD), make(sizes), 19)


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_one_example_per_row(sizes: list[int]) -> None:
    rows = make([[size] for size in sizes])
    check(collate([row[0] for row in rows], length=8, pad_token_id=PAD), rows, 8)
    longest = collate([row[0] for row in rows], pad_token_id=PAD)
    check(longest, rows, max(sizes))
    assert count_tokens(longest) == sum(size for size in sizes if size > 1)


@given(sizes=rows_of_sizes)
@settings(max_examples=20, deadline=None)
def test_arrays_collate_as_lists_do(sizes: list[list[int]]) -> None:
    rows = make(sizes)
    arrays = [[{k: np.array(v, np.int32) for k, v in one.items()} for one in row] for row in rows]
    for name, tensor in collate_packed(arrays, 19, PAD).items():
        assert torch.equal(tensor, collate_packed(rows, 19, PAD)[name])


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="dataset.max_length: a row has 13 tokens.*holds 12"):
        collate([document(0, 13)], length=12)
    with pytest.raises(UserError, match="dataset.max_length: a row has 13 tokens"):
        collate_packed(make([[6, 7]]), 12)


def test_weights_are_laid_out_like_labels() -> None:
    rows = [[document(0, 3, weights=[0.0, 0.5, 2.0]), document(1, 2)], []]
    batch = collate_packed(rows, 6)
    assert batch["weights"].dtype == torch.float32
    assert batch["weights"].tolist() == [[0, 0.5, 2, 1, 1, 0], [0] * 6]
    assert "weights" not in collate_packed(make([[3, 2]]), 6)


def pair(number: int, chosen: int, rejected: int) -> dict[str, Any]:
    return {"chosen": document(2 * number, chosen), "rejected": document(2 * number + 1, rejected)}


def test_pairs_share_a_row_and_are_numbered_through_the_batch() -> None:
    rows = [[pair(0, 2, 3), pair(1, 1, 2)], [pair(2, 4, 4)]]
    batch = complete(collate_examples(rows, 3, 9, PAD))
    assert batch["document_ids"].tolist() == [
        [0, 0, 1, 1, 1, 2, 3, 3, -1],
        [4, 4, 4, 4, 5, 5, 5, 5, -1],
        [-1] * 9,
    ]
    documents = [[p[name] for p in row for name in ("chosen", "rejected")] for row in rows]
    check({k: v for k, v in batch.items() if k != "document_ids"}, [*documents, []], 9)


def test_pairs_that_lie_in_rows_of_their_own() -> None:
    rows = [[pair(0, 2, 3)], [pair(1, 1, 2)]]
    batch = complete(collate_examples(rows, 3, 4, PAD, one_per_row=True))
    assert batch["document_ids"].tolist() == [
        [0, 0, -1, -1],
        [1, 1, 1, -1],
        [2, -1, -1, -1],
        [3, 3, -1, -1],
        [-1] * 4,
        [-1] * 4,
    ]
    check(batch, [[document(i, n)] for i, n in enumerate([2, 3, 1, 2])] + [[], []], 4)


def test_unpaired_documents_carry_their_label() -> None:
    rows = [[document(0, 2, label=True), document(1, 3, label=False)]]
    batch = collate_examples(rows, 2, 6)
    assert batch["document_ids"].tolist() == [[0, 0, 1, 1, 1, -1], [-1] * 6]
    assert batch["document_labels"].tolist() == [[1, 1, 0, 0, 0, -1], [-1] * 6]
    assert {"document_ids", "document_labels"}.isdisjoint(collate_examples(make([[2]]), 1, 3))


def test_questions_end_at_the_same_place() -> None:
    questions = [{"prompt_ids": [1, 2, 3], "answer": "a"}, {"prompt_ids": [4], "answer": "b"}]
    batch = collate_questions(questions, length=4, pad_token_id=PAD)
    assert batch["prompt_ids"].tolist() == [[PAD, 1, 2, 3], [PAD, PAD, PAD, 4]]
    assert batch["prompt_mask"].tolist() == [[False, True, True, True], [False] * 3 + [True]]
    assert batch["answer"] == ["a", "b"]
    rows = [[question] for question in questions]
    filled = collate_examples(rows, 3, 4, PAD, one_per_row=True)
    assert filled["answer"] == ["a", "b", "a"]
    with pytest.raises(UserError, match="questions cannot be packed"):
        collate_examples(rows, 3, 4, PAD)


def test_without_targets_nothing_counts() -> None:
    full = collate_examples([[pair(0, 2, 3)]], 1, 6)
    blank = without_targets(full)
    assert blank.keys() == full.keys()
    assert labelled_tokens(blank["labels"]) == 0 and blank["document_ids"].max() == -1
    assert torch.equal(blank["input_ids"], full["input_ids"])


@settings(max_examples=30, deadline=None)
@given(sizes=rows_of_sizes)
def test_both_ways_to_make_a_mask_agree(sizes: list[list[int]]) -> None:
    positions = lay_out(make(sizes), 19)["position_ids"]
    assert torch.equal(_mask_by_distance(positions), attention_mask(positions))


def loss_of(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """As a training step computes it, but in the model's own precision."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for batch in batches:
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
        ).logits
        logits.float = lambda logits=logits: logits  # cross_entropy computes in float32
        total = total + cross_entropy(logits, batch["labels"], batch.get("weights"))
        weight += float(labelled_tokens(batch["labels"], batch.get("weights")))
    return total / weight


def alone(model: nn.Module, documents: list[dict[str, Any]]) -> Tensor:
    """The weighted mean of the losses of single documents; nothing of ours is used."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for one in documents:
        ids = torch.tensor([one["input_ids"]])
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        for place, label in enumerate(one["labels"]):
            if place > 0 and label != IGNORE_INDEX:
                factor = one["weights"][place] if "weights" in one else 1.0
                total = total - factor * log_probs[place - 1, label]
                weight += factor
    return total / weight


@pytest.mark.parametrize("mode", ["padded", "packed", "bucketed", "padding_free"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_are_the_mean_over_single_documents(mode: Mode, weighted: bool) -> None:
    model = tiny_model("llama").double()
    torch.manual_seed(1)
    documents = []
    for number, size in enumerate((3, 9, 5, 2, 7, 12, 1, 4)):
        ids = torch.randint(1, VOCAB, (size,)).tolist()
        one = {"input_ids": ids, "labels": [t if t % 3 else IGNORE_INDEX for t in ids]}
        if weighted and number % 2:
            one["weights"] = (torch.randint(0, 9, (size,)) / 4).tolist()
        documents.append(one)
    batching = Batching(mode, 2, 12, shapes=2)
    batches = [
        complete(collate_planned(documents, one, batching))
        for one in plan(example_lengths(documents), batching)
    ]
    found, expected = loss_of(model, batches), alone(model, documents)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_steps_and_evaluation_weigh_tokens() -> None:
    model = tiny_model("llama")
    documents = [
        {"input_ids": ids, "labels": ids, "weights": [1, 0.5, 2, 0.25]}
        for ids in ([5, 9, 3, 7], [2, 8, 8, 1])
    ]
    documents.append({"input_ids": [4, 6, 3], "labels": [4, 6, 3]})
    with torch.no_grad():
        expected = float(alone(model, documents))
    batches = [collate(documents[:2], length=6), collate(documents[2:], length=6)]
    program = gt.capture(model)
    assert evaluate_loss(program, batches) == pytest.approx(expected, rel=1e-5)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.0)
    found = gt.compile_step(program, optimizer, compile=False)(batches)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["tokens"] == 8
    batches[0]["weights"].zero_()
    with pytest.raises(UserError, match="every label has the weight 0"):
        gt.compile_step(program, optimizer, compile=False)(batches[0])


def test_weights_of_one_change_nothing() -> None:
    logits, labels = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    labels[0, 2] = IGNORE_INDEX
    ones = torch.ones(2, 5)
    torch.testing.assert_close(cross_entropy(logits, labels, ones), cross_entropy(logits, labels))
    assert labelled_tokens(labels, ones) == labelled_tokens(labels) == 7


@settings(max_examples=30, deadline=None)
@given(sizes=rows_of_sizes)
def test_no_label_leaks_over_a_documents_border(sizes: list[list[int]]) -> None:
    """What a position predicts is the next token of its own document."""
    batch = collate_packed(make(sizes), 19, PAD)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        for here, target in zip(ids, labels[1:], strict=False):
            assert target in (IGNORE_INDEX, here + 1)
    expected = sum(size - 1 for row in sizes for size in row)
    assert labelled_tokens(batch["labels"]) == expected
