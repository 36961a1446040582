"""How the next token is chosen. The rules are those of `transformers`, by its own code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graphtune.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Which token comes next.

    Attributes:
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is
            drawn.
        top_k: draw from the k likeliest only.
        top_p: draw from the likeliest that together have this probability (Holtzman et al. 2020,
            arXiv:1904.09751).
        min_p: draw from those at least so likely, relative to the likeliest (Nguyen et al. 2024,
            arXiv:2407.01082).
        repetition_penalty: above 1, what was said, in the prompt too, is less likely (Keskar et
            al. 2019, arXiv:1909.05858).
        seed: of the drawing. Row i of a batch draws as a single prompt with the seed `seed + i`.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._require(self.temperature >= 0, "temperature", "at least 0")
        self._require(self.top_k is None or self.top_k >= 1, "top_k", "at least 1")
        self._require(self.top_p is None or 0 < self.top_p <= 1, "top_p", "above 0, at most 1")
        self._require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        self._require(self.repetition_penalty > 0, "repetition_penalty", "above 0")
        limits = {name: getattr(self, name) for name in ("top_k", "top_p", "min_p")}
        given = [name for name, value in limits.items() if value is not None]
        self._require(
            self.temperature > 0 or not given,
            "temperature",
            f"above 0 for {' and '.join(given)} to matter",
        )

    def _require(self, right: bool, option: str, must: str) -> None:
        if not right:
            raise UserError(f"`{option}={getattr(self, option)}` must be {must}")

    def processors(self) -> LogitsProcessorList:
        """What is done to the logits, in the order of `transformers`."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            found.append(MinPLogitsWarper(self.min_p))
        return found


class Sampler:
    """Chooses tokens for the rows of a batch, each from random numbers of its own."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self.sampling = sampling
        self.processors = sampling.processors()
        # On the CPU, so that a seed means the same on every device.
        self.generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(rows)]

    def choose(self, logits: Tensor, said: list[list[int]]) -> list[int]:
        """One token for each row.

        Args:
            logits: (rows, vocab).
            said: the ids of each row so far, prompt included.
        """
        logits = logits.float()
        if self.processors:
            logits = torch.cat(
                [self._processed(logits[i : i + 1], ids) for i, ids in enumerate(said)]
            )
        if self.sampling.temperature == 0:
            return logits.argmax(-1).tolist()
        weights = torch.softmax(logits, -1).cpu()
        return [
            int(torch.multinomial(row, 1, generator=generator))
            for row, generator in zip(weights, self.generators, strict=True)
        ]

    def _processed(self, logits: Tensor, ids: list[int]) -> Tensor:
        given: Any = torch.tensor([ids], device=logits.device)
        return self.processors(given, logits)
