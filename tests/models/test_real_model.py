"""A real model says the same through our code as through transformers': SmolLM2-135M-Instruct,
Q4_1 de-quantised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphtune as gt
from graphtune.generation import encode_chat, generate
from graphtune.models import load_model, load_tokenizer
from graphtune.models.families import build_model
from graphtune.program import Program

NEW_TOKENS = 40
QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Write a short story about a lighthouse keeper.",
    "Explain how a sorting algorithm works.",
]


@pytest.fixture(scope="module")
def theirs(smollm2_file: Path) -> nn.Module:
    return load_model(smollm2_file).eval()


@pytest.fixture(scope="module")
def prompts(smollm2_file: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(smollm2_file)
    return [encode_chat(tokenizer, question, None) for question in QUESTIONS]


@pytest.fixture(scope="module")
def continued(theirs: nn.Module, prompts: list[list[int]]) -> list[Tensor]:
    """What transformers' own `generate` says, greedily and with its cache; prompts included."""
    model: Any = theirs
    return [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=-1,  # go on after the answer's end
            use_cache=True,
        )[0]
        for prompt in prompts
    ]


@pytest.fixture(scope="module", params=["transformers", "graphtune"])
def program(theirs: nn.Module, request: pytest.FixtureRequest) -> Program:
    if request.param == "transformers":
        return gt.capture(theirs).eval()
    ours = build_model(theirs.config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours.tie_weights()
    return gt.capture(ours).eval()


@torch.no_grad()
def test_greedy_continuations_are_transformers(
    program: Program, prompts: list[list[int]], continued: list[Tensor]
) -> None:
    """Each token is the likeliest one after all before it: so a loop would have said the same."""
    for prompt, ids in zip(prompts, continued, strict=True):
        assert len(ids) == len(prompt) + NEW_TOKENS
        likeliest = program(ids[None])[0].argmax(-1)
        assert likeliest[len(prompt) - 1 : -1].tolist() == ids[len(prompt) :].tolist()


@pytest.mark.slow
def test_a_greedy_loop_says_the_same(
    program: Program, prompts: list[list[int]], continued: list[Tensor]
) -> None:
    tokens = generate(program, [prompts[1]], max_new_tokens=NEW_TOKENS)
    assert [token.id for token in tokens] == continued[1][len(prompts[1]) :].tolist()
