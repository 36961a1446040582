"""Packs and batches against brute force, and against each document on its own."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from graphtune.data import IGNORE_INDEX, Batch, Example, batches, collate, collate_packed, pack
from graphtune.data import count_batches as count
from graphtune.errors import UserError

LENGTH = 12
sizes = st.lists(st.integers(1, LENGTH), max_size=20)


def make(sizes: list[int]) -> list[Example]:
    """Documents whose tokens are all different: document and place can be read off a token."""
    return [
        Example(
            input_ids=[1000 * (document + 1) + place for place in range(size)],
            labels=[1000 * (document + 1) + place for place in range(size)],
        )
        for document, size in enumerate(sizes)
    ]


@given(sizes=sizes)
def test_every_token_is_packed_once_in_rows_that_fit(sizes: list[int]) -> None:
    examples = make(sizes)
    packs = pack(examples, LENGTH)
    assert all(0 < len(row["input_ids"]) <= LENGTH for row in packs)
    tokens = Counter(token for row in packs for token in row["input_ids"])
    assert tokens == Counter(token for example in examples for token in example["input_ids"])


@given(sizes=sizes)
def test_documents_stay_whole_with_their_own_positions(sizes: list[int]) -> None:
    for row in pack(make(sizes), LENGTH):
        assert len({len(column) for column in row.values()}) == 1
        for i, token in enumerate(row["input_ids"]):
            assert row["position_ids"][i] == token % 1000
            assert row["labels"][i] == (IGNORE_INDEX if token % 1000 == 0 else token)
            continues = i > 0 and row["document_ids"][i] == row["document_ids"][i - 1]
            assert continues == (token % 1000 > 0)
            if continues:
                assert token == row["input_ids"][i - 1] + 1


@given(sizes=sizes)
def test_packing_is_tight_and_deterministic(sizes: list[int]) -> None:
    packs = pack(make(sizes), LENGTH)
    assert packs == pack(make(sizes), LENGTH)
    # No two rows could have been one: what any fit that opens rows only in need gives.
    by_size = sorted(len(row["input_ids"]) for row in packs)
    assert len(by_size) < 2 or by_size[0] + by_size[1] > LENGTH


def test_packing_uses_the_fewest_rows_where_first_come_does_not() -> None:
    assert len(pack(make([4, 7, 5, 8]), LENGTH)) == 2  # 4 + 8 and 7 + 5


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="dataset.max_length: an example has 13 tokens.*holds 12"):
        pack(make([3, 13]), LENGTH)
    with pytest.raises(UserError, match="dataset.max_length: a row has 13 tokens"):
        collate(make([13]), length=LENGTH)


def check_batch(batch: Batch, rows: int, length: int, pad: int) -> None:
    """Every entry of a batch of `make`'s documents, one by one."""
    assert batch["attention_mask"].shape == (rows, 1, length, length)
    assert batch["attention_mask"].dtype == torch.bool
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].shape == (rows, length) and batch[name].dtype == torch.int64
    for row in range(rows):
        tokens = batch["input_ids"][row].tolist()
        for query in range(length):
            token = tokens[query]
            if token == pad:
                assert batch["labels"][row, query] == IGNORE_INDEX
            for key in range(length):
                same = token != pad and token // 1000 == tokens[key] // 1000
                expected = (same and key <= query) or key == query
                assert batch["attention_mask"][row, 0, query, key].item() == expected


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_packed_batches_attend_within_documents(sizes: list[int]) -> None:
    packs = pack(make(sizes), 6)
    check_batch(collate_packed(packs, 8, pad_token_id=7), len(packs), 8, 7)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_padded_batches_attend_within_documents(sizes: list[int]) -> None:
    examples = make(sizes)
    check_batch(collate(examples, length=8, pad_token_id=7), len(sizes), 8, 7)
    longest = collate(examples, pad_token_id=7)
    assert longest["input_ids"].shape == (len(sizes), max(sizes))
    for row, example in enumerate(examples):
        assert longest["input_ids"][row, : sizes[row]].tolist() == example["input_ids"]
        assert longest["position_ids"][row, : sizes[row]].tolist() == list(range(sizes[row]))


@settings(max_examples=40, deadline=None)
@given(sizes=sizes, rows=st.integers(1, 5), packed=st.booleans(), epoch=st.integers(0, 3))
def test_an_epoch_has_every_document_once_in_fixed_shapes(
    sizes: list[int], rows: int, packed: bool, epoch: int
) -> None:
    examples = make(sizes)
    found = list(
        batches(examples, batch_size=rows, length=LENGTH, packed=packed, seed=1, epoch=epoch)
    )
    assert len(found) == count(examples, batch_size=rows, length=LENGTH, packed=packed)
    tokens: Counter[int] = Counter()
    targets = 0
    for batch in found:
        assert batch["input_ids"].shape == batch["labels"].shape == (rows, LENGTH)
        assert batch["attention_mask"].diagonal(dim1=2, dim2=3).all()  # no row without a key
        tokens.update(token for token in batch["input_ids"].flatten().tolist() if token)
        targets += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    assert tokens == Counter(token for example in examples for token in example["input_ids"])
    assert targets == sum(size - 1 for size in sizes)


def order(epoch: int, seed: int = 0, shuffle: bool = True) -> list[int]:
    found = batches(make([2] * 30), batch_size=4, length=2, seed=seed, epoch=epoch, shuffle=shuffle)
    return [token for batch in found for token in batch["input_ids"][:, 0].tolist() if token]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    assert order(0) == order(0)
    assert sorted(order(0)) == sorted(order(1)) == order(5, shuffle=False)
    assert len({tuple(order(e, s)) for e in range(3) for s in range(3)}) == 9


@pytest.mark.parametrize("packed", [False, True])
def test_batches_give_each_document_the_logits_that_it_has_alone(packed: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    documents = [torch.randint(1, 50, (size,)).tolist() for size in (3, 9, 5, 2, 7, 4, 1)]
    examples = [Example(input_ids=ids, labels=ids) for ids in documents]
    compared = 0
    for batch in batches(examples, batch_size=3, length=12, packed=packed):
        with torch.no_grad():
            logits = model(
                batch["input_ids"],
                attention_mask=batch["attention_mask"],
                position_ids=batch["position_ids"],
            ).logits
        assert logits.isfinite().all()
        for row in range(3):
            starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            for ids in documents:
                for start in starts:
                    span = slice(start, start + len(ids))
                    if batch["input_ids"][row, span].tolist() == ids:
                        with torch.no_grad():
                            alone = model(torch.tensor([ids])).logits[0]
                        torch.testing.assert_close(logits[row, span], alone, atol=1e-5, rtol=0)
                        compared += 1
    assert compared >= len(documents)
