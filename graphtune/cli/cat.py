"""graphtune cat: print a config."""

import sys

from graphtune.cli.app import Config, app
from graphtune.config import find_config


@app.command(rich_help_panel="Configs")
def cat(config: Config) -> None:
    """Print CONFIG as it is written, comments and all."""
    sys.stdout.write(find_config(config).read_text(encoding="utf-8"))
