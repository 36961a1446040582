"""graphtune validate: check a config without running it."""

from graphtune.cli.app import OVERRIDES, Config, Overrides, app
from graphtune.config import SCHEMAS, did_you_mean, load_config
from graphtune.config import validate as validate_config
from graphtune.errors import UserError


@app.command(context_settings=OVERRIDES, rich_help_panel="Configs")
def validate(config: Config, overrides: Overrides = None) -> None:
    """Check CONFIG: its keys, types, components and passes; nothing is loaded or run."""
    settings = load_config(config, overrides or ())
    recipe = str(settings.get("recipe"))
    if recipe not in SCHEMAS:
        raise UserError(f"unknown recipe `recipe={recipe}`{did_you_mean(recipe, SCHEMAS)}")
    from graphtune.passes import registry  # here, since it imports torch

    validate_config(settings, SCHEMAS[recipe], registry)
    print(f"{config}: valid")
