"""What one rank exchanges with the others in a step, found by running it on shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from graphtune.distributed import DATA_AXES, group_name, wide
from graphtune.inspect.memory import empty_batch, empty_tensors, loss_on_shapes
from graphtune.losses import Loss
from graphtune.torch_private import TensorMode, fake_tensors

if TYPE_CHECKING:
    from graphtune.program import Program

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]
Phase = Literal["forward", "backward"]
_c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Exchange:
    """A kind of collective over an axis of the mesh, in one half of a step.

    Attributes:
        phase: what is computed again for the backward pass is exchanged in it.
        axis: of the mesh.
        kind: of collective.
    """

    phase: Phase
    axis: str
    kind: Kind


@dataclass(frozen=True)
class Amount:
    """How often, and how much.

    Attributes:
        calls: of the collective.
        bytes: of the whole tensors that a rank has after a gather, before a scatter, and before
            as after an all-reduce; all calls together.
    """

    calls: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.calls + other.calls, self.bytes + other.bytes)

    def sent(self, kind: Kind, ranks: int) -> int:
        """Bytes that one rank sends over a ring: (n - 1) / n of the whole, twice to all-reduce."""
        ways = 2 if kind == "all-reduce" else 1
        return ways * self.bytes * (ranks - 1) // ranks


Traffic = Mapping[Exchange, Amount]


def traffic(program: Program, batch: int, seq: int, *, loss: Loss | None = None) -> Traffic:
    """What this rank exchanges in forward and backward pass, on a batch of this shape.

    Counted without a compiler, which may join collectives, and not what it computes again. The
    numbers that a step adds up over ranks (loss, tokens, norm) are not part of it.

    Args:
        program: one that is spread over a mesh, perhaps a pretended one; on any device.
        batch, seq: rows, and tokens per row, of one rank.
        loss: of its logits, where the ranks exchange something for it.
    """
    distribution = program.distribution
    if distribution is None:
        return {}
    mesh = distribution.mesh
    axes = {group_name(mesh, axis): axis for axis in wide(mesh, (*DATA_AXES, "tp"))}
    with fake_tensors(), _Counting(axes) as counting:
        value = loss_on_shapes(
            program, empty_tensors(program), empty_batch(program, batch, seq), loss
        )
        counting.phase = "backward"
        value.backward()
    return counting.found


class _Counting(TensorMode):
    """Counts collectives by the axis whose group they have."""

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self.axes = axes
        self.phase: Phase = "forward"
        self.found: dict[Exchange, Amount] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op is _c10d.all_gather_into_tensor.default:
            self._add("all-gather", args[2], result)
        elif op is _c10d.reduce_scatter_tensor.default:
            self._add("reduce-scatter", args[3], args[0])
        elif op is _c10d.all_reduce.default:
            self._add("all-reduce", args[2], result)
        return result

    def _add(self, kind: Kind, group: str, whole: torch.Tensor) -> None:
        key = Exchange(self.phase, self.axes[group], kind)
        self.found[key] = self.found.get(key, Amount()) + Amount(1, whole.nbytes)
