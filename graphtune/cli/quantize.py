"""graphtune quantize: keep a model's weights in a few bits."""

from pathlib import Path
from typing import Annotated

import typer

from graphtune.cli.app import app


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The program's file, model.gt.")],
    format: Annotated[str, typer.Option(help="nf4, int8 or int4.")] = "nf4",
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="Which weights, as passes' targets; by default all linears but the head."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to quantize: auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Quantize MODEL weight by weight, and save the program in one safetensors file.

    Example: graphtune quantize HuggingFaceTB/SmolLM2-135M -o smollm2_nf4.gt
    """
    import graphtune as gt  # torch is slow to import, and --help should not be
    from graphtune.errors import UserError
    from graphtune.models import resolve_dtype
    from graphtune.passes import Quantize
    from graphtune.quantization import FORMATS
    from graphtune.training.device import pick_device

    if format not in FORMATS:
        raise UserError(f"--format={format} must be one of {', '.join(FORMATS)}")
    chosen = Quantize(format=format, **({"targets": tuple(targets)} if targets else {}))  # type: ignore[arg-type]
    where = pick_device(device)
    empty = gt.load_model(model, device="meta", dtype=resolve_dtype("auto", where))
    program = gt.load_weights(gt.capture(empty).apply(chosen), device=where)
    program.save(output)
    before = sum(p.numel() * p.element_size() for p in empty.parameters())
    print(f"saved {output}: {output.stat().st_size / 1e6:,.0f} MB of {before / 1e6:,.0f} MB")
