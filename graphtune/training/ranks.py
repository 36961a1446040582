"""What the ranks of a run agree on, so that none waits for another forever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from graphtune.distributed import current_mesh, data_rank, is_main, is_spread
from graphtune.errors import UserError
from graphtune.training.determinism import seed_everything

T = TypeVar("T")


def main_first(work: Callable[[], T]) -> T:
    """Let rank 0 do what leaves something in a cache, then all others, which find it there.

    The work must have no collectives.

    Raises:
        UserError: on every rank, what it raised on one.
    """
    if not is_spread():
        return work()
    result: Any = None
    for turn in (True, False):
        failure: Exception | None = None
        if is_main() == turn:
            try:
                result = work()
            except Exception as error:
                failure = error
        raise_together(failure)
    return result


def on_main(work: Callable[[], T]) -> T:
    """What rank 0, which works alone, returns, on every rank. The work must have no collectives.

    Raises:
        UserError: on every rank, what it raised.
    """
    result: Any = None
    failure: Exception | None = None
    if is_main():
        try:
            result = work()
        except Exception as error:
            failure = error
    raise_together(failure)
    return from_main(result)


def raise_together(failure: Exception | None) -> None:
    """Raise on every rank if there is a failure on one; all must call, at the same place.

    A rank that went on alone would wait in its next collective for one that has raised.

    Raises:
        Exception: this rank's own failure; else a UserError that names the rank and its.
    """
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    said = str(failure) if isinstance(failure, UserError) else text
    for rank, message in enumerate(gathered(said)):
        if failure is not None:
            raise failure
        if message is not None:
            raise UserError(f"rank {rank}: {message}")


def together(work: Callable[[], object]) -> None:
    """Let every rank work, without collectives; raise on all, see above, if one of them does."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        failure = error
    raise_together(failure)


def gathered(value: Any) -> list[Any]:
    """What each rank gives, by rank; small things that can be pickled."""
    if not is_spread():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gathered_counts(counts: Sequence[int]) -> list[list[int]]:
    """The counts that each rank gives, by rank; as many from each, in one collective."""
    if not is_spread():
        return [list(counts)]
    own = torch.tensor(counts, dtype=torch.int64, device=current_mesh("mesh").device_type)
    found = own.new_empty(dist.get_world_size() * len(counts))
    dist.all_gather_into_tensor(found, own)
    return found.view(-1, len(counts)).tolist()


def from_main(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not is_spread():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_any(*flags: bool) -> list[bool]:
    """Of each flag, whether it is set on any rank."""
    if not is_spread():
        return list(flags)
    # On the device: a group that someone else has made may have no other backend.
    found = torch.tensor(flags, dtype=torch.int32, device=current_mesh("mesh").device_type)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(one) for one in found.tolist()]


def same(value: Any, otherwise: str) -> None:
    """Raise UserError, saying `otherwise`, on every rank if a value differs among them."""
    if any(one != value for one in from_main(gathered(value))):
        raise UserError(otherwise)


def seed_rank(seed: int) -> None:
    """Let ranks with other batches draw other random numbers, once the model is the same on all."""
    place, _ = data_rank()
    if place > 0:
        seed_everything((seed + 1_000_003 * place) % 2**32)
