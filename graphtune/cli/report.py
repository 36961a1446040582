"""graphtune report: draw and compare runs."""

from pathlib import Path
from typing import Annotated

import typer

from graphtune.cli.app import app


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="The output_dir of training runs.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the report; by default the first run's."),
    ] = None,
) -> None:
    """Draw the curves of each RUN in one picture (PNG) and one page (HTML) that stands alone.

    Example: graphtune report runs/lora runs/dora --out comparison
    """
    from graphtune.training.report import write_report  # torch is slow to import
    from graphtune.training.run import Run

    opened = [Run.open(folder) for folder in runs]
    for path in write_report(opened, out or opened[0].folder):
        print(path)
