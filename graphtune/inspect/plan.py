"""What one rank of a mesh holds and exchanges in a step, as a table or as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from graphtune.inspect.memory import MemoryEstimate
from graphtune.inspect.traffic import Amount, Exchange, Traffic


@dataclass(frozen=True)
class Plan:
    """A step on a mesh, without the mesh.

    Attributes:
        mesh: sizes of its axes, by name.
        batch, seq: rows, and tokens per row, that a rank is given.
        memory: what rank 0, which has no less than any other, holds.
        traffic: what it exchanges.
        theory: what it must, by `graphtune.inspect.theory`.
    """

    mesh: Mapping[str, int]
    batch: int
    seq: int
    memory: MemoryEstimate
    traffic: Traffic
    theory: Traffic

    @property
    def ranks(self) -> int:
        return prod(self.mesh.values())

    def rows(self) -> list[dict[str, Any]]:
        """By kind of exchange: calls, bytes of the whole, bytes that a rank sends over a ring."""
        rows = []
        for key in sorted({*self.traffic, *self.theory}, key=_order):
            found, expected = (one.get(key, Amount()) for one in (self.traffic, self.theory))
            rows.append(
                {
                    **asdict(key),
                    **asdict(found),
                    "sent_bytes": found.sent(key.kind, self.mesh[key.axis]),
                    "theory_calls": expected.calls,
                    "theory_bytes": expected.bytes,
                }
            )
        return rows

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "mesh": dict(self.mesh),
            "ranks": self.ranks,
            "batch": self.batch,
            "seq": self.seq,
            "memory": asdict(self.memory),
            "exchanges": self.rows(),
        }

    def __str__(self) -> str:
        axes = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1)
        lines = [
            f"one of {self.ranks} ranks, {axes}: a step on {self.batch} x {self.seq} tokens, "
            "before the compiler fuses operators",
            "",
            str(self.memory),
            "",
            f"{'':<9}{'axis':<13}{'exchange':<15}{'calls':>7}{'MiB':>13}{'sent MiB':>13}  theory",
        ]
        for row in self.rows():
            sizes = f"{row['bytes'] / 2**20:>13,.2f}{row['sent_bytes'] / 2**20:>13,.2f}"
            lines.append(
                f"{row['phase']:<9}{row['axis']:<13}{row['kind']:<15}{row['calls']:>7,}{sizes}  "
                + _beside_theory(row)
            )
        return "\n".join(lines)


def _beside_theory(row: Mapping[str, Any]) -> str:
    if (row["calls"], row["bytes"]) == (row["theory_calls"], row["theory_bytes"]):
        return "the same"
    return f"{row['theory_calls']:,} calls, {row['theory_bytes'] / 2**20:,.2f} MiB"


def _order(key: Exchange) -> tuple[bool, str, str]:
    return key.phase == "backward", key.axis, key.kind
