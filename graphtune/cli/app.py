"""The frame around every subcommand: the app they register with, and how errors end."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer

from graphtune.allocator import preload_allocator
from graphtune.cli.completion import config_names
from graphtune.config import foreign_code
from graphtune.errors import UserError

app = typer.Typer(
    name="graphtune",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# For subcommands that take `key=value` words: a `--key` among them reaches `load_config`,
# which tells how to write it.
OVERRIDES = {"ignore_unknown_options": True}
Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML file, or a name that `graphtune ls` lists.",
        autocompletion=config_names,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE | ~KEY]...",
        help="Set a key (passes.lora.rank=16) or remove one (~passes.lora).",
        show_default=False,
    ),
]


def note(text: str) -> None:
    """Say something that is no result of the command: on stderr, where no program reads it."""
    print(f"graphtune: {text}", file=sys.stderr)


def tell_foreign_code(config: Any) -> None:
    """Say which code a config runs that is neither graphtune's nor torch's.

    Args:
        config: as plain mappings and lists.
    """
    for key, path in foreign_code(config):
        note(f"`{key}` runs {path}, which is not part of graphtune or torch")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"graphtune {version('graphtune')}")
        raise typer.Exit()


@app.callback()
def graphtune(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Fine-tune any language model as a graph: capture, rewrite with passes, train, ship."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and arguments[:1] in (["train"], ["bench"]):
        preload_allocator()
    _quiet_libraries()
    debug = "--debug" in arguments
    if debug:  # accepted after the subcommand too, which does not know it
        arguments = ["--debug", *(word for word in arguments if word != "--debug")]
    try:
        app(arguments, prog_name="graphtune")
    except UserError as error:
        _report(" ".join(str(error).split()), debug)
        sys.exit(2)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        hint = "" if debug else " (--debug shows the traceback)"
        _report(f"{type(error).__name__}: {first_line}{hint}", debug)
        sys.exit(1)


def _quiet_libraries() -> None:
    """Keep what libraries say while they are imported out of a command's output."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for name in ("torchao", "torch.utils._pytree"):  # kernels that other devices have; enums
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def _report(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"graphtune: error: {message}", file=sys.stderr)
