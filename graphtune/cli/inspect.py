"""graphtune inspect: what a config's passes do to its model."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from graphtune.cli.app import OVERRIDES, Config, Overrides, app


@app.command(context_settings=OVERRIDES)
def inspect(
    config: Config,
    overrides: Overrides = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Also what changed in the graph of one layer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The ledger for a machine.")] = False,
) -> None:
    """Show the module tree with what each pass did, and the ledger; no weights are loaded.

    Example: graphtune inspect configs/quickstart.yaml passes.lora.rank=16
    """
    from graphtune.capture import capture  # torch is slow to import, and --help should not be
    from graphtune.config import SFTConfig, load_config, validate
    from graphtune.inspect import ledger
    from graphtune.recipes import empty_model, make_passes
    from graphtune.training.device import pick_device

    settings: SFTConfig = validate(load_config(config, overrides or ()))
    base = capture(empty_model(settings.model, pick_device(settings.device)))
    program = base.apply(*make_passes(settings.passes))
    if as_json:
        print(json.dumps([asdict(row) for row in program.ledger]))
        return
    print(program)
    print(program.tree())
    print()
    print(ledger(program))
    if diff:
        print()
        print(program.diff(base))
