"""The ledger as a table: what each pass did."""

import io

from rich.console import Console
from rich.table import Table

from graphtune.program import LedgerRow, Program


def ledger(program: Program) -> str:
    """One row for each pass: sites, nodes, parameters, bytes, time, and its numerics class."""
    table = Table(title="ledger", title_justify="left", pad_edge=False)
    table.add_column("pass")
    for name in ("sites", "nodes ±", "parameters ±", "trainable", "bytes ±", "ms"):
        table.add_column(name, justify="right")
    table.add_column("numerics")
    table.add_column("options, figures")
    for row in program.ledger:
        table.add_row(*_cells(row))
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _cells(row: LedgerRow) -> list[str]:
    options = " ".join(f"{key}={_plain(value)}" for key, value in row.options.items())
    options += "".join(f" {key}: {value:.3g}" for key, value in row.figures.items())
    numbers = (row.nodes, row.parameters)
    return [
        row.name,
        f"{len(row.sites):,}",
        *(f"{number:+,}" for number in numbers),
        f"{row.trainable:,}",
        f"{row.bytes:+,}",
        f"{row.ms:.0f}",
        row.numerics,
        options,
    ]


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
