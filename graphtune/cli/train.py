"""graphtune train: run a recipe."""

import pkgutil
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from graphtune.cli.app import OVERRIDES, Config, Overrides, app
from graphtune.config import did_you_mean, load_config
from graphtune.errors import UserError


@app.command(context_settings=OVERRIDES)
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a model as CONFIG says."""
    settings = load_config(config, overrides or ())
    find_recipe(settings.get("recipe")).run(settings)


def recipe_names() -> list[str]:
    """The recipes there are; none is imported, since that would import torch."""
    package = find_spec("graphtune.recipes")
    folders = package.submodule_search_locations if package else None
    return sorted(module.name for module in pkgutil.iter_modules(folders or []))


def find_recipe(name: object) -> ModuleType:
    """The module `graphtune.recipes.<name>`; raises UserError if there is none."""
    names = recipe_names()
    if name is None:
        raise UserError(f"missing `recipe`: one of {', '.join(names)}")
    if name not in names:
        raise UserError(f"unknown recipe `recipe={name}`{did_you_mean(str(name), names)}")
    return import_module(f"graphtune.recipes.{name}")
