"""Attention within documents, beside torch's attention with a mask."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from graphtune.document_attention import document_attention
from graphtune.masks import document_mask, find_documents
from tests.oracles.kernels import counting

KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu"


def positions(*rows):
    """Of rows of documents of these lengths, filled up with padding to the longest."""
    length = max(map(sum, rows))
    padded = [[i for size in row for i in range(size)] for row in rows]
    return torch.tensor([one + [0] * (length - len(one)) for one in padded])


def by_hand(position_ids):
    """The mask, token by token: how far a query sees back is its position."""
    rows, length = position_ids.shape
    mask = torch.zeros(rows, 1, length, length, dtype=torch.bool)
    for row in range(rows):
        for query in range(length):
            mask[row, 0, query, query - int(position_ids[row, query]) : query + 1] = True
    return mask


def inputs(rows, length, heads=4, shared=2, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)

    def one(count):  # laid out by tokens, as linears give them
        drawn = torch.randn(rows, length, count, width, generator=generator, dtype=dtype)
        return drawn.transpose(1, 2).requires_grad_()

    return one(heads), one(shared), one(shared)


CASES = {
    "one row": [(5, 3, 9)],
    "padding": [(4, 6), (13,), (2,), (5, 1, 2)],
    "padding alone": [(7, 2), (), (3,)],
    "whole rows": [(12,), (12,), (12,), (5, 7), (12,)],
    "each row": [(9,), (9,)],
    "long": [(700, 324), (1024,)],
}


def random_case(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 12, (4,), generator=generator).tolist() for _ in range(3)]


@pytest.mark.parametrize("rows", [*CASES.values(), random_case(1), random_case(2)])
def test_forward_and_gradients_are_those_of_a_mask(rows):
    places = positions(*rows)
    given = inputs(*places.shape)
    documents = find_documents(places)
    out, _ = document_attention(*given, documents, 0.3)
    with sdpa_kernel(SDPBackend.MATH):
        expected = scaled_dot_product_attention(*given, by_hand(places), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    slope = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(one, given, slope) for one in (out, expected))
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [*CASES.values(), random_case(3)])
def test_masks_are_those_of_the_positions(rows):
    places = positions(*rows)
    assert torch.equal(document_mask(find_documents(places), places), by_hand(places))


def test_documents_are_found_in_a_piece_of_a_batch():
    """A row that begins within a text, positions that leave some out, and no text at all."""
    places = torch.tensor([[7, 8, 0, 1, 0, 0], [0, 1, 40, 41, 0, 1], [0, 0, 0, 0, 0, 0]])
    assert find_documents(places).tolist() == [[0, 2], [2, 4], [6, 10], [10, 12]]
    assert find_documents(places[2:]).tolist() == [[0, 0], [0, 0]]


def test_the_kernel_is_called_once_for_each_document_and_for_rows_that_are_one():
    places = positions(*CASES["whole rows"])
    given = inputs(*places.shape)
    with counting(KERNEL) as calls:
        document_attention(*given, find_documents(places), 0.3)
    assert calls[KERNEL] == [[3, 4, 12, 8], [1, 4, 5, 8], [1, 4, 7, 8], [1, 4, 12, 8]]


def test_bfloat16():
    places = positions((5, 3, 9))
    given = inputs(*places.shape)
    low = [one.detach().bfloat16().requires_grad_() for one in given]
    documents = find_documents(places)
    expected = document_attention(*given, documents, 0.3)[0]
    found = document_attention(*low, documents, 0.3)[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    torch.autograd.grad(found.float().sum(), low)


def test_gradients_are_the_differences():
    places = positions((3, 2), (4,))
    given = inputs(*places.shape, heads=2, shared=1, width=4, dtype=torch.float64)
    documents = find_documents(places)
    assert torch.autograd.gradcheck(lambda *x: document_attention(*x, documents, 0.4)[0], given)


@pytest.mark.parametrize("rows", [[(3, 2), (4,)], [(5,), (5,)]])
def test_the_operator_is_what_compilers_take_it_for(rows):
    places = positions(*rows)
    given = (*inputs(*places.shape, heads=2, shared=1, width=4), find_documents(places), 0.4)
    torch.library.opcheck(document_attention, given)


def test_a_document_that_no_row_holds_is_refused():
    given = inputs(2, 6)
    with pytest.raises(ValueError, match="from 4 to 8 does not lie in a row of 6"):
        document_attention(*given, torch.tensor([[0, 4], [4, 8]]), 1 / math.sqrt(8))
