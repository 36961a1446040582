"""graphtune cp: copy a config of the catalogue, to change it."""

from pathlib import Path
from typing import Annotated

import typer

from graphtune.cli.app import Config, app
from graphtune.config import config_text
from graphtune.errors import UserError


@app.command(rich_help_panel="Configs")
def cp(
    config: Config,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A file or a folder.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite DEST.")] = False,
    make_parents: Annotated[
        bool, typer.Option("--make-parents", help="Create the folders above DEST.")
    ] = False,
) -> None:
    """Copy CONFIG to DEST, where it can be changed.

    Example: graphtune cp llama3_1/8B_lora my_config.yaml
    """
    text = config_text(config)
    if destination.is_dir():
        destination /= Path(config).name
    if destination.suffix not in (".yaml", ".yml"):
        destination = destination.with_name(destination.name + ".yaml")
    if destination.exists() and not force:
        raise UserError(f"`{destination}` exists; --force overwrites it")
    if make_parents:
        destination.parent.mkdir(parents=True, exist_ok=True)
    elif not destination.parent.is_dir():
        raise UserError(f"no folder `{destination.parent}`; --make-parents creates it")
    destination.write_text(text, encoding="utf-8")
    print(f"Copied {config} to {destination}")
