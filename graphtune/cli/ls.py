"""graphtune ls: the configs that come with graphtune."""

import json
from typing import Annotated

import typer
from omegaconf import OmegaConf

from graphtune.cli.app import app
from graphtune.config import SCHEMAS, catalogue, load_config, models, techniques


@app.command(rich_help_panel="Configs")
def ls(
    as_json: Annotated[bool, typer.Option("--json", help="The same for a machine.")] = False,
) -> None:
    """List the catalogue: configs with their recipe and model, and techniques to put behind one.

    Example: graphtune ls
    """
    rows = []
    for name in catalogue():
        if not name.startswith("techniques/"):
            config = load_config(name)
            model = OmegaConf.select(config, "model.id", default=None)
            if model is not None:  # else it is what others are laid over
                rows.append({"config": name, "recipe": config.get("recipe"), "model": model})
    if as_json:
        print(json.dumps({"configs": rows, "techniques": techniques(), "recipes": list(SCHEMAS)}))
        return
    table = [[str(value or "-") for value in row.values()] for row in rows]
    table.insert(0, ["CONFIG", "RECIPE", "MODEL"])
    first, second = (max(len(line[column]) for line in table) for column in (0, 1))
    for config_name, recipe, model in table:
        print(f"{config_name:<{first}}  {recipe:<{second}}  {model}")
    if (behind := techniques()) and (known := models()):
        print(f"\nTechniques, behind a model's name ({known[0]}_{behind[0]}): {', '.join(behind)}")
