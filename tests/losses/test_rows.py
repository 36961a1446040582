"""The excerpt of a batch that compiled gradients are checked on."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from graphtune.losses import IGNORE_INDEX, excerpt


def batch_of(rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (rows, length), generator=generator)
    ignored = torch.rand(ids.shape, generator=generator) < 0.7
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ignored, IGNORE_INDEX),
        "attention_mask": torch.rand((rows, 1, length, length), generator=generator) < 0.5,
        "position_ids": torch.arange(length).expand(rows, -1),
        "weights": torch.rand((rows, length), generator=generator).round(),  # 0: of no weight
    }


@given(st.integers(1, 5), st.integers(2, 40), st.integers(1, 3), st.integers(2, 20), st.integers(0))
def test_it_is_a_block_with_as_many_labels_as_any(
    rows: int, length: int, most_rows: int, most: int, seed: int
) -> None:
    batch = batch_of(rows, length, seed % 1000)
    found = excerpt(batch, rows=most_rows, length=most)
    size, n = min(rows, most_rows), min(length, most)
    assert found["labels"].shape == (size, n)
    start = int(found["position_ids"][0, 0])
    window = slice(start, start + n)
    for row, tokens in enumerate(found["input_ids"]):
        whole = next(
            i
            for i in range(rows)
            if torch.equal(
                batch["attention_mask"][i, :, window, window], found["attention_mask"][row]
            )
            and torch.equal(batch["input_ids"][i, window], tokens)
        )
        for name in ("labels", "weights", "position_ids"):
            assert torch.equal(batch[name][whole, window], found[name][row])
    labelled = (batch["labels"] != IGNORE_INDEX) & (batch["weights"] != 0)
    fullest = labelled[labelled.sum(1).topk(size).indices]
    windows = [int(fullest[:, at : at + n].sum()) for at in range(length - n + 1)]
    counted = (found["labels"] != IGNORE_INDEX) & (found["weights"] != 0)
    assert int(counted.sum()) == max(windows)


def test_images_keep_their_batch_whole() -> None:
    batch = {**batch_of(3, 90, 0), "pixel_values": torch.zeros(1, 3, 4, 4)}
    assert excerpt(batch) is batch
