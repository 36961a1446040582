"""Every rank of a run is there, and is of the same run, before any of them starts to work.

A collective of ranks that are not alike hangs, or is silently wrong. A key-value store is enough
to find out, and says who is missing.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from graphtune.errors import UserError


def world() -> tuple[int, int]:
    """This process's rank, and how many there are, as a launcher such as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def connect(timeout_s: float) -> dist.Store:
    """The store at `MASTER_ADDR` and `MASTER_PORT`, of this attempt of the run.

    torchrun's agent has it; without one, rank 0 does.

    Args:
        timeout_s: seconds to wait for it, and for what others write to it.

    Raises:
        UserError: it does not answer in time, or the launcher has not said where it is.
    """
    rank, _ = world()
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} without MASTER_ADDR and MASTER_PORT: start "
            "the processes with --nproc-per-node or torchrun"
        ) from error
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store: dist.Store = dist.TCPStore(
            address,
            port,
            is_master=rank == 0 and not served,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            f"rank {rank}: rank 0 cannot be met at {address}:{port} (`mesh.timeout_s={timeout_s:g}`"
            f"): {str(error).partition(chr(10))[0][:120]}"
        ) from error
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def call(store: dist.Store, facts: Mapping[str, str], timeout_s: float) -> None:
    """Return once all ranks have called, with the same facts.

    Args:
        store: see `connect`.
        facts: by name, what must be the same on all ranks: versions, keys of the config.
        timeout_s: seconds to wait for the last one.

    Raises:
        UserError: on every rank, naming a rank that is missing, or a fact that differs.
    """
    rank, ranks = world()
    own = {"host": socket.gethostname(), "facts": dict(facts)}
    store.set(f"rank-{rank}", json.dumps(own))
    if rank == 0:
        store.set("verdict", _verdict(store, facts, ranks, timeout_s))
    # Rank 0 says so itself when one is missing; only if it is silent, this does.
    if not _has(store, ["verdict"], timeout_s + 30):
        raise UserError(f"rank {rank}: rank 0 has not called in `mesh.timeout_s={timeout_s:g}`")
    message = store.get("verdict").decode()
    store.set(f"read-{rank}", "")
    if message:
        if rank == 0:  # the store may end with it
            called = [r for r in range(ranks) if store.check([f"rank-{r}"])]
            _has(store, [f"read-{r}" for r in called], 10)
        raise UserError(message)


def _verdict(store: dist.Store, facts: Mapping[str, str], ranks: int, timeout_s: float) -> str:
    everyone = [f"rank-{r}" for r in range(ranks)]
    if not _has(store, everyone, timeout_s):
        missing = [str(r) for r, key in enumerate(everyone) if not store.check([key])]
        names = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        return (
            f"no sign of rank {names} of {ranks} in `mesh.timeout_s={timeout_s:g}`; was it "
            "started, and can it reach MASTER_ADDR?"
        )
    for other in range(1, ranks):
        said = json.loads(store.get(f"rank-{other}"))
        for name in {**facts, **said["facts"]}:
            here, there = facts.get(name, "absent"), said["facts"].get(name, "absent")
            if here != there:
                return (
                    f"ranks are not of one run: `{name}` is {here} on rank 0, {there} on rank "
                    f"{other} ({said['host']})"
                )
    return ""


def _has(store: dist.Store, keys: list[str], timeout_s: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError):
        return False
    return True
