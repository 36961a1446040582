"""The command line on several ranks, as torchrun starts it, in processes that start fast."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.oracles.ranks import _context

Ended = tuple[int | None, str]  # exit code, what was said


def _rank(words: list[str], log: str, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    import torch

    from graphtune.cli import main

    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main(words)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(
    folder: Path, *words: object, ranks: int = 2, of_rank: Mapping[int, Any] | None = None
) -> list[Ended]:
    """Run `graphtune WORDS` on each rank and wait for all.

    Args:
        folder: for what they say.
        ranks: how many.
        of_rank: by rank, more words; None does not start the rank.
    """
    other = dict(of_rank or {})
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = {}
    for rank in range(ranks):
        more = other.get(rank, ())
        if more is None:
            continue
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        keep = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        log = folder / f"rank-{rank}.log"
        args = ([str(word) for word in (*words, *more)], str(log), keep | address | place)
        processes[rank] = (_context.Process(target=_rank, args=args), log)
        processes[rank][0].start()
    ended: list[Ended] = []
    for process, log in processes.values():
        process.join(300)
        if process.is_alive():
            process.kill()
            process.join()
        ended.append((process.exitcode, log.read_text(errors="replace")))
    return ended
