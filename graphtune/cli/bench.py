"""graphtune bench: how fast a config trains on this machine."""

import json
from typing import Annotated

import typer

from graphtune.cli.app import OVERRIDES, Config, Overrides, app, note


@app.command(context_settings=OVERRIDES)
def bench(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time, after the first.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="The figures for a machine.")] = False,
) -> None:
    """Time training steps of CONFIG, with random weights and tokens in full rows.

    Neither weights nor data are needed. Real data have padding, which makes fewer tokens of the
    same steps count.

    Example: graphtune bench quickstart --steps 20
    """
    from graphtune.config import SFTConfig, load_config, validate
    from graphtune.recipes.bench import bench as measure  # torch is slow to import

    figures = measure(validate(load_config(config, overrides or ()), SFTConfig), steps)
    if figures["note"]:
        note(figures["note"])
    if as_json:
        print(json.dumps(figures))
        return
    rows, length = figures["batch"]
    batches = f"{figures['accumulation']} x {rows} x {length} random tokens"
    spread = f"{figures['fastest_step_s']:.3f} to {figures['slowest_step_s']:.3f}"
    mfu = f", {figures['mfu']:.1%} of the device's" if "mfu" in figures else ""
    how = "compiled" if figures["compiled"] else "not compiled"
    print(f"{'on':<12}{figures['device']}, {figures['dtype']}, {how}, random weights")
    print(f"{'trains':<12}{figures['trainable']:,} parameters")
    print(f"{'a step':<12}{batches}")
    print(f"{'first step':<12}{figures['first_step_s']:.2f} s")
    print(f"{'step':<12}{figures['step_s']:.3f} s (median of {steps}; {spread})")
    print(f"{'speed':<12}{figures['tokens_per_s']:,.0f} tokens/s")
    print(f"{'arithmetic':<12}{figures['tflops_per_s']:.3f} TFLOP/s{mfu}")
    print(f"{'memory':<12}{figures['peak_memory_bytes'] / 2**30:.2f} GiB at the peak")
