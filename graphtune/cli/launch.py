"""Start a command in several processes, as torchrun does and with its options."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from graphtune.errors import UserError


@dataclass(frozen=True)
class LaunchOptions:
    """Options of torchrun as it reads them, and how many processes they ask for in all."""

    torchrun: Namespace
    processes: int


def split_off_options(words: Sequence[str]) -> tuple[LaunchOptions | None, list[str]]:
    """Options of torchrun at the front of a command line, and the words behind them.

    torchrun's own parser reads them. There are none if the first word is no option.

    Raises:
        UserError: an option that torchrun has not, a value that it refuses, or nothing behind.
    """
    if not words[0].startswith("-"):
        return None, list(words)
    from torch.distributed import run as torchrun  # slow to import, and rarely needed

    parser = torchrun.get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    parsed, unknown = parser.parse_known_args(list(words))
    if unknown:
        key, _, value = unknown[0].lstrip("-").partition("=")
        raise UserError(
            f"unknown option `{unknown[0]}`; config keys are set without dashes: "
            f"`{key or 'key'}={value or 'value'}`"
        )
    try:
        per_node = torchrun.determine_local_world_size(parsed.nproc_per_node)
        _, nodes = torchrun.parse_min_max_nnodes(parsed.nnodes)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"options of torchrun: {error}") from error
    behind = [parsed.training_script, *parsed.training_script_args]
    return LaunchOptions(parsed, per_node * nodes), behind


def _refuse(message: str) -> NoReturn:
    raise UserError(f"options of torchrun, which go before CONFIG: {message}")


def launch(options: LaunchOptions, words: Sequence[str]) -> None:
    """Run `graphtune WORDS` in each process, and wait for them.

    Exits as the first process did that failed; each has said why. A signal reaches all of them.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    asked = options.torchrun
    if asked.nnodes == "1:1" and not asked.rdzv_endpoint and asked.rdzv_backend == "static":
        asked.standalone = True  # a free port: two runs on one machine do not meet
    asked.module = True
    asked.training_script = "graphtune"
    asked.training_script_args = list(words)
    try:
        torchrun.run(asked)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(max(failure.exitcode, 1))
    except SignalException:  # handed on to the processes, which have ended by now
        sys.exit(130)
