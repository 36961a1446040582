"""graphtune export: ship what a run trained."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from graphtune.cli.app import app
from graphtune.cli.generate import Run


@app.command()
def export(
    run: Run,
    to: Annotated[
        Literal["executorch", "hf", "peft"],
        typer.Option(
            help="executorch: a .pte for devices; hf: merged safetensors; peft: the adapter."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; by default RUN/TO.")
    ] = None,
    max_seq_len: Annotated[
        int, typer.Option(min=2, help="executorch: most tokens that the program takes.")
    ] = 512,
) -> None:
    """Export the model that RUN trained, its adapter merged where the target has none.

    Example: graphtune export runs/quickstart --to executorch
    """
    import graphtune.export as targets  # torch is slow to import, and --help should not be
    from graphtune.passes import Convert, Merge
    from graphtune.passes.adapters import adapter_names
    from graphtune.recipes import check_begun, load_run

    folder = output or Path(run) / to
    # Integers go to devices; other formats hold what was trained, in full precision.
    if to == "executorch":
        check_begun(run)
    program, tokenizer = load_run(run, quantized=False, aware=to == "executorch")
    if to == "peft":
        print(f"saved {targets.to_peft(program, folder)}")
        return
    applied = {row.name for row in program.ledger}
    if "qat" in applied and "convert" not in applied:
        program = program.apply(Convert())
    elif adapter_names(program) and "qat" not in applied:
        program = program.apply(Merge())
    if to == "hf":
        print(f"saved {targets.to_hf(program, folder, tokenizer=tokenizer)}")
        return
    report = targets.to_executorch(program, folder, max_seq_len=max_seq_len, tokenizer=tokenizer)
    done, left = report.delegated_nodes, report.undelegated_nodes
    print(f"lowered in {report.lowering_s:.0f} s, {report.size_bytes / 1e6:.0f} MB")
    print(f"XNNPACK runs {done} of {done + left} operators, in {report.delegates} delegates")
    print(
        f"ran in the ExecuTorch runtime: logits differ from eager by at most "
        f"{report.max_abs_diff:.2g} (they reach {report.max_abs_logit:.3g}); loads in "
        f"{report.load_s:.1f} s, prefill {report.prefill_tokens_per_s:.0f} tokens/s"
    )
    print(f"saved {report.path}")
