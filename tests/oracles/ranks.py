"""A few processes joined by gloo, which run functions that tests give them.

Processes take seconds to start, so that a world is started once for a file of tests. They come
from a server that has imported the libraries already, where nothing has run yet.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.oracles.distributed_cases"])


class RankFailed(AssertionError):
    """A rank raised, died, or did not answer in time."""


def _serve(rank: int, size: int, file: str, pipe: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=600),
    )
    pipe.send((True, None))
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class World:
    """`size` processes, from the first call on; a call runs a function on all of them.

    The function is one that a module has by name; it, what it takes and what it returns is pickled.
    """

    def __init__(self, size: int, timeout: float = 600) -> None:
        """
        Args:
            timeout: seconds that a call may take; a machine that others use may be slow.
        """
        self.size = size
        self.timeout = timeout
        self._pipes: list[Any] = []
        self._processes: list[Any] = []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        file = str(Path(self._folder.name, "rendezvous"))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        for rank in range(self.size):
            ours, theirs = _context.Pipe()
            args = (rank, self.size, file, theirs, environment)
            process = _context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returns on each rank, in their order.

        Raises:
            RankFailed: with the trace of the first rank that raised, or naming those that died or
                are silent; the next call starts other processes.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._collect()

    def _collect(self) -> list[Any]:
        deadline = time.monotonic() + self.timeout
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            for rank, pipe in enumerate(self._pipes):
                if rank in answers or not pipe.poll(0.02):
                    continue
                try:
                    fine, answer = pipe.recv()
                except EOFError:
                    self._fail(f"rank {rank} died")
                if not fine:
                    self._fail(f"rank {rank} of {self.size}:\n{answer}")
                answers[rank] = answer
            if time.monotonic() > deadline:
                silent = sorted(set(range(self.size)) - answers.keys())
                self._fail(f"no answer from ranks {silent} in {self.timeout:g} s")
        return [answers[rank] for rank in range(self.size)]

    def _fail(self, message: str) -> None:
        self.stop()
        raise RankFailed(message)

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._pipes = [], []
