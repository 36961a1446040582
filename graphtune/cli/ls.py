"""graphtune ls: the configs that come with graphtune."""

from omegaconf import OmegaConf

from graphtune.cli.app import app
from graphtune.cli.train import recipe_names
from graphtune.config import catalogue, load_config, models, techniques


@app.command(rich_help_panel="Configs")
def ls() -> None:
    """List the catalogue: configs with their recipe and model, and techniques to put behind one.

    Example: graphtune ls
    """
    behind = techniques()
    rows = [("CONFIG", "RECIPE", "MODEL")]
    for name in catalogue():
        if not name.startswith("techniques/"):
            config = load_config(name)
            model = OmegaConf.select(config, "model.id", default="-")
            rows.append((name, str(config.get("recipe", "-")), str(model)))
    with_config = {recipe for _, recipe, _ in rows}
    rows += [("-", recipe, "-") for recipe in recipe_names() if recipe not in with_config]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for config_name, recipe, model in rows:
        print(f"{config_name:<{widths[0]}}  {recipe:<{widths[1]}}  {model}")
    if behind and (known := models()):
        print(f"\nTechniques, behind a model's name ({known[0]}_{behind[0]}): {', '.join(behind)}")
