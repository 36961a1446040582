"""graphtune evaluate: loss and perplexity on held-out data."""

import json
from pathlib import Path
from typing import Annotated

import typer

from graphtune.cli.app import OVERRIDES, Overrides, app
from graphtune.cli.completion import config_names


@app.command(context_settings=OVERRIDES)
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CONFIG",
            help="The output_dir of a training run, or a config whose model is evaluated.",
            autocompletion=config_names,
        ),
    ],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="The figures for a machine.")] = False,
) -> None:
    """Measure the loss on held-out data, `dataset_val` and `retention` of the config.

    Of a run, before and after training; of a config, its model as it is.

    Example: graphtune evaluate runs/quickstart

    Example: graphtune evaluate quickstart model.id=HuggingFaceTB/SmolLM2-360M-Instruct
    """
    from graphtune.config import SFTConfig, load_config, validate
    from graphtune.recipes.evaluate import evaluate_model, evaluate_run  # torch is slow to import

    if Path(target).is_dir():
        figures = evaluate_run(target, overrides or ())
    else:
        figures = evaluate_model(validate(load_config(target, overrides or ()), SFTConfig))
    if as_json:
        print(json.dumps(figures))
        return
    names = ["", *figures]
    print("".join(f"{name:>22}" if index else f"{name:<22}" for index, name in enumerate(names)))
    for row in next(iter(figures.values())):
        values = "".join(f"{one[row]:>22.4f}" for one in figures.values())
        print(f"{row.replace('_', ' '):<22}{values}")
