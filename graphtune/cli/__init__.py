"""The `graphtune` command. To add a subcommand, add a file here and its name to the import.

Nothing here imports torch before a subcommand needs it: help is instant.
"""

from graphtune.cli import (  # noqa: F401  (each registers itself)
    bench,
    cat,
    cp,
    data,
    download,
    evaluate,
    export,
    generate,
    inspect,
    ls,
    merge,
    quantize,
    report,
    train,
    validate,
)
from graphtune.cli.app import app, main

__all__ = ["app", "main"]
