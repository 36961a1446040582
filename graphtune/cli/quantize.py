"""graphtune quantize: keep a model's weights in a few bits."""

from pathlib import Path
from typing import Annotated, Any

import typer

from graphtune.cli.app import OVERRIDES, Overrides, app
from graphtune.cli.completion import config_names


@app.command(context_settings=OVERRIDES)
def quantize(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CONFIG|MODEL",
            help="A training run, a config, or a model: hub id, folder, .gguf file.",
            autocompletion=config_names,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder; with --format a file, model.gt.")
    ],
    overrides: Overrides = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="8da4w, 8da8w, int4, int8 or int8_static: integers for devices. Of a run that "
            "was trained with qat: as it was."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="How weights are rounded: rtn (to the nearest), hqq or awq.")
    ] = "rtn",
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale; 0: a row. 4 bits: 32.")
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="Which weights, as passes' targets, perhaps with a scheme: '*embed_tokens=int4'; "
            "by default all linears but the head."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Without --scheme: nf4, int8 or int4, a base to train adapters over."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to quantize: auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Quantize weights, and the inputs of linears with --scheme 8da4w, and save the result.

    Loss and perplexity before and after are measured on the config's held-out data
    (`dataset_val`); for a model, on English prose. The folder is a run for other commands.

    Example: graphtune quantize runs/quickstart --scheme 8da4w -o runs/quickstart-8da4w

    Example: graphtune quantize HuggingFaceTB/SmolLM2-135M --format nf4 -o smollm2_nf4.gt
    """
    from graphtune.errors import UserError
    from graphtune.passes import QAT

    if format is not None:
        if scheme is not None or method != "rtn":
            raise UserError("--format goes without --scheme and --method")
        _format(target, output, format, targets, device)
        return
    from graphtune.recipes.quantize import METHODS
    from graphtune.recipes.quantize import quantize as run  # torch is slow to import

    if method not in METHODS:
        raise UserError(f"--method={method} must be one of {', '.join(METHODS)}")
    qat = None
    if scheme is not None:
        rules: tuple[Any, ...] = tuple(map(_rule, targets or ("all-linear",)))
        qat = QAT(scheme=scheme, group_size=group_size, targets=rules)  # type: ignore[arg-type]
    elif targets or group_size is not None:
        raise UserError("--targets and --group-size go with --scheme or --format")
    figures = run(
        target,
        output,
        qat,
        method=method,  # type: ignore[arg-type]
        overrides=[*(overrides or ()), f"device={device}"],
    )
    print(f"{'':<22}{'before':>12}{'after':>12}")
    for name, before in figures["before"].items():
        print(f"{name.replace('_', ' '):<22}{before:>12.4f}{figures['after'][name]:>12.4f}")
    print(f"saved {output}")


def _rule(target: str) -> Any:
    """A rule for QAT: a pattern, or one with a scheme behind `=`."""
    sites, given, scheme = target.partition("=")
    return {"sites": sites, "scheme": scheme} if given else target


def _format(model: str, output: Path, format: str, targets: list[str] | None, device: str) -> None:
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
