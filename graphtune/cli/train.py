"""graphtune train: run a recipe, in one process or in several."""

import os
from importlib import import_module
from types import ModuleType

from omegaconf import OmegaConf

from graphtune.cli.app import OVERRIDES, Config, Overrides, app, tell_foreign_code
from graphtune.cli.launch import launch, split_off_options
from graphtune.config import SCHEMAS, did_you_mean, load_config
from graphtune.errors import UserError


# Words are taken in their order: options of torchrun come before CONFIG.
@app.command(context_settings={**OVERRIDES, "allow_interspersed_args": False})
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a model as CONFIG says.

    Options of torchrun go before CONFIG and start a process for each device:
    --nproc-per-node, --nnodes, --rdzv-endpoint, ...; `torchrun --help` lists them.

    Example: graphtune train llama3_2/1B_lora optimizer.lr=1e-4

    Example: graphtune train --nproc-per-node 2 llama3_2/1B_lora
    """
    options, words = split_off_options([config, *(overrides or ())])
    settings = load_config(words[0], words[1:])
    recipe = find_recipe(settings.get("recipe"))
    processes = int(os.environ.get("WORLD_SIZE", "1")) if options is None else options.processes
    if processes > 1 and not getattr(recipe, "DISTRIBUTED", False):
        raise UserError(
            f"`recipe={settings.recipe}` trains in one process so far, not in {processes}; leave "
            "out the options of torchrun"
        )
    if options is not None:
        launch(options, ["train", *words])
        return
    if os.environ.get("RANK", "0") == "0":
        tell_foreign_code(OmegaConf.to_container(settings))
    recipe.run(settings)


def find_recipe(name: object) -> ModuleType:
    """The module `graphtune.recipes.<name>`; raises UserError if there is none."""
    if name is None:
        raise UserError(f"missing `recipe`: one of {', '.join(SCHEMAS)}")
    if name not in SCHEMAS:
        raise UserError(f"unknown recipe `recipe={name}`{did_you_mean(str(name), SCHEMAS)}")
    return import_module(f"graphtune.recipes.{name}")
