"""graphtune ls: the configs that come with graphtune."""

from omegaconf import OmegaConf

from graphtune.cli.app import app
from graphtune.cli.train import recipe_names
from graphtune.config import catalogue, load_config


@app.command(rich_help_panel="Configs")
def ls() -> None:
    """List the catalogue: each config, its recipe and its model; and recipes without one."""
    rows = [("CONFIG", "RECIPE", "MODEL")]
    for name in catalogue():
        config = load_config(name)
        model = OmegaConf.select(config, "model.id", default="-")
        rows.append((name, str(config.get("recipe", "-")), str(model)))
    with_config = {recipe for _, recipe, _ in rows}
    rows += [("-", recipe, "-") for recipe in recipe_names() if recipe not in with_config]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for config_name, recipe, model in rows:
        print(f"{config_name:<{widths[0]}}  {recipe:<{widths[1]}}  {model}")
