"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864) and ways to stretch them.

A head's channels are taken in pairs, and each pair is turned by an angle that is the position times
the pair's frequency. What differs between models is the frequencies: a `Rope` makes them, and a
`RotaryEmbedding` turns positions into the cosines and sines that attention needs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (batch or 1, 1, seq, dim / 2)


@dataclass(frozen=True)
class Rope:
    """Unstretched rotary positions.

    Attributes:
        dim: how many of a head's channels are turned; the rest stay as they are.
        theta: the base: pair i of `dim` / 2 has the frequency `theta ** (-2 i / dim)`.
        amplitude: a factor on cosines and sines, as some of the methods below ask for.
    """

    dim: int
    theta: float = 10_000.0
    amplitude: float = 1.0

    def exponents(self) -> Tensor:
        return torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim

    def frequencies(self) -> Tensor:
        """(dim / 2,), float32."""
        return 1.0 / self.theta ** self.exponents()

    def tables(self) -> dict[str, Tensor]:
        """What is computed once: buffers of `RotaryEmbedding`, by name."""
        return {"inv_freq": self.frequencies()}

    def choose(self, tables: dict[str, Tensor], position_ids: Tensor) -> Tensor:
        """The frequencies for a batch with these positions."""
        return tables["inv_freq"]


@dataclass(frozen=True)
class LinearRope(Rope):
    """All positions `factor` times closer (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""

    factor: float = 1.0

    def frequencies(self) -> Tensor:
        return super().frequencies() / self.factor


@dataclass(frozen=True)
class Llama3Rope(Rope):
    """Llama 3.1's: `factor` times lower frequencies for all that turn slowly.

    Pairs that turn fewer than `low` times within `original_length` are stretched, those that turn
    more than `high` times are not, and in between it goes linearly.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def frequencies(self) -> Tensor:
        plain = super().frequencies()
        turns = self.original_length / (2 * math.pi / plain)
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - keep) * plain / self.factor + keep * plain


@dataclass(frozen=True)
class YarnRope(Rope):
    """YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071), "NTK by parts".

    As `Llama3Rope`, but linear in the number of the pair: from the pair that turns `fast` times
    within `original_length` to the one that turns `slow` times.
    """

    factor: float = 1.0
    original_length: int = 4096
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True

    def frequencies(self) -> Tensor:
        wavelengths = self.theta ** self.exponents()  # over 2 pi
        first, last = self._pair(self.fast), self._pair(self.slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.dim - 1)
        width = last - first or 0.001
        pairs = torch.arange(self.dim // 2, dtype=torch.float32)
        keep = 1 - ((pairs - first) / width).clamp(0, 1)
        return (1 / (self.factor * wavelengths)) * (1 - keep) + (1 / wavelengths) * keep

    def _pair(self, turns: float) -> float:
        """The pair, not rounded, that turns so often within the original length."""
        reach = math.log(self.original_length / (turns * 2 * math.pi))
        return self.dim * reach / (2 * math.log(self.theta))


@dataclass(frozen=True)
class LongRope(Rope):
    """LongRoPE (Ding et al. 2024, https://arxiv.org/abs/2402.13753): a factor for each pair.

    There are two sets of factors, (dim / 2,) each, and a batch with a position at or beyond
    `original_length` uses the long ones for all its positions.
    """

    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    original_length: int = 4096

    def tables(self) -> dict[str, Tensor]:
        wavelengths = self.theta ** self.exponents()
        return {
            "inv_freq": 1.0 / (torch.tensor(self.short_factors) * wavelengths),
            "long_inv_freq": 1.0 / (torch.tensor(self.long_factors) * wavelengths),
        }

    def choose(self, tables: dict[str, Tensor], position_ids: Tensor) -> Tensor:
        is_long = position_ids.max() >= self.original_length
        return torch.where(is_long, tables["long_inv_freq"], tables["inv_freq"])


@dataclass(frozen=True)
class DynamicRope(Rope):
    """Dynamic NTK scaling: the base grows with the longest sequence of the batch.

    Up to `length` it is `theta`. Whatever ran before does not matter, unlike in `transformers`.
    """

    factor: float = 1.0
    length: int = 4096

    def tables(self) -> dict[str, Tensor]:
        return {"exponents": self.exponents()}

    def choose(self, tables: dict[str, Tensor], position_ids: Tensor) -> Tensor:
        longest = (position_ids.max() + 1).clamp(min=self.length)
        growth = self.factor * longest / self.length - (self.factor - 1)
        return 1.0 / (self.theta * growth ** (self.dim / (self.dim - 2))) ** tables["exponents"]


class RotaryEmbedding(nn.Module):
    """Positions -> rotation; the frequencies are buffers that no checkpoint holds."""

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.rope = rope
        for name, table in rope.tables().items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> Rotation:
        """position_ids (batch or 1, seq) -> cosines and sines of `dtype`, computed in float32."""
        frequencies = self.rope.choose(dict(self.named_buffers()), position_ids)
        angles = position_ids[:, None, :, None].float() * frequencies.float()
        cos, sin = angles.cos() * self.rope.amplitude, angles.sin() * self.rope.amplitude
        return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn heads (batch, heads, seq, head_dim) by their positions.

    Channel i of the turned ones makes a pair with channel i + dim / 2.
    """
    cos, sin = rotation
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)
