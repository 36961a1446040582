"""graphtune inspect: what a config's passes do to its model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphtune.cli.app import OVERRIDES, Config, Overrides, app, note
from graphtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from graphtune.config import SFTConfig
    from graphtune.inspect import MemoryEstimate
    from graphtune.inspect.plan import Plan
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
    mesh: Annotated[
        str | None,
        typer.Option(help="Also what one rank of a mesh such as dp=8,tp=2 holds and exchanges."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="The ledger for a machine; with --memory, --mesh {ledger, memory, mesh}."
        ),
    ] = False,
) -> None:
    """Show the module tree with what each pass did, and the ledger; no weights are loaded.

    A published model's shapes are known without the hub, or an account on it.

    Example: graphtune inspect llama3_1/8B_qlora passes.qlora.rank=16
    """
    from graphtune.capture import capture  # torch is slow to import, and --help should not be
    from graphtune.config import SFTConfig, load_config, validate
    from graphtune.inspect import ledger
    from graphtune.passes import Stage
    from graphtune.recipes import config_to_look_at, empty_model, make_passes
    from graphtune.training.device import pick_device

    settings = validate(load_config(config, overrides or ()), SFTConfig)
    model_config, remark = config_to_look_at(settings.model)
    if remark:
        note(remark)
    sizes = None if mesh is None else _sizes(mesh, settings, model_config)
    base = capture(empty_model(settings.model, pick_device(settings.device), model_config))
    passes = make_passes(settings.passes)
    whole = base.apply(*(one for one in passes if one.stage < Stage.DISTRIBUTE))
    program = whole.apply(*(one for one in passes if one.stage > Stage.DISTRIBUTE))
    plan = None if sizes is None else _plan(whole, settings, sizes)
    if as_json:
        rows = [asdict(row) for row in program.ledger]
        more = {"memory": asdict(_memory(program, settings)[1])} if memory else {}
        more |= {"mesh": plan.as_json()} if plan else {}
        print(json.dumps({"ledger": rows, **more} if more else rows))
        return
    print(program)
    print(program.tree())
    print()
    print(ledger(program))
    if memory:
        shape, taken = _memory(program, settings)
        print(f"\na step on {shape[0]} x {shape[1]} tokens, before the compiler fuses operators\n")
        print(taken)
    if plan:
        print(f"\n{plan}")
    if diff:
        print()
        print(program.diff(base))


def _shape(settings: SFTConfig) -> tuple[int, int]:
    """Rows of a batch, and tokens of a row."""
    options = settings.loader
    rows = 1 if options.batch_size == "auto" else options.batch_size
    return (1, rows * options.length) if options.mode == "padding_free" else (rows, options.length)


def _sizes(text: str, settings: SFTConfig, model_config: PretrainedConfig) -> dict[str, int]:
    """The sizes of a mesh's axes, `dp=8,tp=2`; `dp` is `dp_shard`."""
    from graphtune.config import did_you_mean
    from graphtune.distributed import AXES

    chosen = (settings.passes.get("tensor_parallel") or {}).get("targets")
    names = () if chosen else ("num_attention_heads", "num_key_value_heads")
    heads = {key: getattr(model_config, key, None) for key in names}

    sizes: dict[str, int] = {}
    for word in text.split(","):
        name, _, size = word.strip().partition("=")
        axis = "dp_shard" if name == "dp" else name
        if axis not in AXES:
            known = ("dp", *AXES)
            raise UserError(
                f"`--mesh {text}`: a mesh has no axis {name!r}{did_you_mean(name, known)}"
            )
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"`--mesh {text}`: {name}={size} must be a number of ranks from 1")
        undivided = [f"{k}={n}" for k, n in heads.items() if n and axis == "tp" and n % int(size)]
        if undivided:
            raise UserError(
                f"`--mesh {text}`: tp={size} does not divide the model's {undivided[0]}; choose a "
                "divisor"
            )
        if axis in sizes:
            raise UserError(f"`--mesh {text}`: {axis} is given twice")
        sizes[axis] = int(size)
    if max(sizes.values()) == 1:
        raise UserError(f"`--mesh {text}` is one process; give an axis 2 ranks or more")
    return sizes


def _plan(whole: Program, settings: SFTConfig, sizes: dict[str, int]) -> Plan:
    """What rank 0 of a mesh holds and exchanges, its program made as the recipe makes it."""
    from graphtune.distributed import pretended
    from graphtune.inspect.plan import Plan
    from graphtune.inspect.theory import expected
    from graphtune.inspect.traffic import traffic
    from graphtune.passes import Stage
    from graphtune.recipes import make_passes
    from graphtune.recipes.job import check_spread, loss_of

    wanted = {"tp": "tensor_parallel", "cp": "context_parallel"}
    options: dict[str, Any] = {
        name: None for axis, name in wanted.items() if sizes.get(axis, 1) > 1
    }
    options |= settings.passes
    with pretended(sizes) as pretended_mesh:
        passes = make_passes(options)
        check_spread(settings, passes)
        program = whole.apply(*(one for one in passes if one.stage >= Stage.DISTRIBUTE))
        (batch, seq), memory = _memory(program, settings)
        loss = None if "rows" in program.inputs else loss_of(settings, passes)
        axes = zip(pretended_mesh.mesh_dim_names or (), pretended_mesh.shape, strict=True)
        return Plan(
            mesh=dict(axes),
            batch=batch,
            seq=seq,
            memory=memory,
            traffic=traffic(program, batch, seq, loss=loss),
            theory=expected(whole, program, batch, seq),
        )


def _memory(program: Program, settings: SFTConfig) -> tuple[tuple[int, int], MemoryEstimate]:
    """The shape of a batch of the config, and what a step on it takes."""
    from graphtune.config import instantiate

    shape = _shape(settings)
    taken = program.memory(
        *shape,
        optimizer=lambda parameters: instantiate(
            settings.optimizer, [(f"parameter.{i}", p) for i, p in enumerate(parameters)]
        ),
    )
    return shape, taken
