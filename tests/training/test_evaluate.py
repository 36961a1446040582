"""Evaluated loss is that of transformers, whatever the batches."""

import pytest
import torch

import graphtune as gt
from graphtune.data import Batching, Loader
from graphtune.training.evaluate import evaluate_loss
from tests.oracles.models import random_ids, tiny_gpt2, tiny_model


def examples():
    rows = [random_ids(1, length, seed=length)[0].tolist() for length in (5, 9, 12, 7, 4)]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in rows]


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_mean_over_all_labelled_tokens(mode):
    model = tiny_model("llama").eval()
    loss, tokens = 0.0, 0
    for row in examples():
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        labelled = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            loss += model(input_ids=ids, labels=labels).loss.item() * labelled
        tokens += labelled
    found = evaluate_loss(
        gt.capture(model), Loader(examples(), Batching(mode, batch_size=2, length=16))
    )
    assert found == pytest.approx(loss / tokens, rel=1e-5)


def test_dropout_is_off_and_the_mode_restored():
    program = gt.capture(tiny_gpt2(dropout=0.5))
    data = list(Loader(examples(), Batching("padded", batch_size=2, length=16)))
    assert evaluate_loss(program, data) == evaluate_loss(program, data)
    assert program.training
