"""Sampling is transformers'; a seed gives the same tokens again, in a batch and alone."""

import pytest
import torch
from transformers import GenerationConfig

import graphtune as gt
from graphtune.generation import Sampling
from graphtune.generation.sampling import Sampler
from tests.oracles.models import VOCAB, random_ids, tiny_model

OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 0.9, "min_p": 0.2},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4},
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").eval()


@pytest.mark.parametrize("options", OPTIONS)
def test_rules_are_those_that_transformers_builds(model, options):
    """From a config of generation, `transformers` makes its own list, in its own order."""
    config = GenerationConfig(do_sample=True, **({"top_k": 0} | options))
    theirs = model._get_logits_processor(
        generation_config=config, input_ids_seq_length=6, encoder_input_ids=None
    )
    ids = random_ids(1, 6)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    expected = theirs(ids, logits.clone())
    found = Sampling(**options).processors()(ids, logits.clone())
    assert torch.equal(found, expected)
    assert torch.equal(found, logits) == (options == {"temperature": 1.0})


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampler = Sampler(Sampling(temperature=0.5, top_k=3, seed=4), 1)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sampler.choose(logits, [[0]])[0]] += 1
    expected = torch.softmax(torch.tensor([0.0, 2.0, 4.0]), 0)
    assert counts[3] == 0
    assert torch.allclose(counts[:3] / 4000, expected, atol=0.03)


def test_rows_draw_from_seeds_of_their_own():
    logits = torch.zeros(1, 50)
    both = Sampler(Sampling(temperature=1, seed=7), 2)
    alone = [Sampler(Sampling(temperature=1, seed=7 + row), 1) for row in range(2)]
    for _ in range(20):
        found = both.choose(logits.repeat(2, 1), [[0], [0]])
        assert found == [one.choose(logits, [[0]])[0] for one in alone]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": 1, "top_k": 0}, "top_k=0"),
        ({"temperature": 1, "top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1, "min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"top_p": 0.5}, "above 0 for top_p to matter"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(gt.UserError, match=message):
        Sampling(**options)
