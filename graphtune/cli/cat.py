"""graphtune cat: print a config."""

import sys

from graphtune.cli.app import Config, app
from graphtune.config import config_text


@app.command(rich_help_panel="Configs")
def cat(config: Config) -> None:
    """Print CONFIG as it is written, comments and all.

    Example: graphtune cat llama3_1/8B_lora
    """
    sys.stdout.write(config_text(config))
