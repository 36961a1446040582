"""graphtune inspect: what a config's passes do to its model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from graphtune.cli.app import OVERRIDES, Config, Overrides, app, note

if TYPE_CHECKING:
    from graphtune.config import SFTConfig
    from graphtune.inspect import MemoryEstimate
    from graphtune.program import Program


@app.command(context_settings=OVERRIDES)
def inspect(
    config: Config,
    overrides: Overrides = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Also what changed in the graph of one layer.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also what a training step holds, by the graph.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="The ledger for a machine; with --memory, {ledger, memory}."),
    ] = False,
) -> None:
    """Show the module tree with what each pass did, and the ledger; no weights are loaded.

    A published model's shapes are known without the hub, or an account on it.

    Example: graphtune inspect llama3_1/8B_qlora passes.qlora.rank=16
    """
    from graphtune.capture import capture  # torch is slow to import, and --help should not be
    from graphtune.config import SFTConfig, load_config, validate
    from graphtune.inspect import ledger
    from graphtune.recipes import config_to_look_at, empty_model, make_passes
    from graphtune.training.device import pick_device

    settings = validate(load_config(config, overrides or ()), SFTConfig)
    model_config, remark = config_to_look_at(settings.model)
    if remark:
        note(remark)
    base = capture(empty_model(settings.model, pick_device(settings.device), model_config))
    program = base.apply(*make_passes(settings.passes))
    if as_json:
        rows = [asdict(row) for row in program.ledger]
        estimate = asdict(_memory(program, settings)[1]) if memory else None
        print(json.dumps({"ledger": rows, "memory": estimate} if memory else rows))
        return
    print(program)
    print(program.tree())
    print()
    print(ledger(program))
    if memory:
        shape, taken = _memory(program, settings)
        print(f"\na step on {shape[0]} x {shape[1]} tokens, before the compiler fuses operators\n")
        print(taken)
    if diff:
        print()
        print(program.diff(base))


def _memory(program: Program, settings: SFTConfig) -> tuple[tuple[int, int], MemoryEstimate]:
    """The shape of a batch of the config, and what a step on it takes."""
    from graphtune.config import instantiate

    options = settings.loader
    rows = 1 if options.batch_size == "auto" else options.batch_size
    shape = (1, rows * options.length) if options.mode == "padding_free" else (rows, options.length)
    taken = program.memory(
        *shape,
        optimizer=lambda parameters: instantiate(
            settings.optimizer, [(f"parameter.{i}", p) for i, p in enumerate(parameters)]
        ),
    )
    return shape, taken
