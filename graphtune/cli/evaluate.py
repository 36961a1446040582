"""graphtune evaluate: loss and perplexity on held-out data, or the tasks of lm_eval."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from graphtune.cli.app import OVERRIDES, Overrides, app
from graphtune.cli.completion import config_names
from graphtune.errors import UserError


@app.command(context_settings=OVERRIDES)
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CONFIG|MODEL",
            help="The output_dir of a training run, or a config whose model is evaluated; with "
            "--tasks a run, a .gt file, or a model: hub id, folder or .gguf file.",
            autocompletion=config_names,
        ),
    ],
    overrides: Overrides = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of EleutherAI's lm_eval: hellaswag,arc_easy", metavar="NAMES"),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Of tasks: a run's model as it was before training.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Of tasks: put prompts into the chat template.")
    ] = False,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Of tasks: examples before each question.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of tasks: only so many questions of each.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Of tasks: texts that are read at once.")
    ] = 8,
    include_path: Annotated[
        Path | None, typer.Option(help="Of tasks: a folder with your own, as YAML files.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Of tasks: all that lm_eval tells of them, as JSON."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The figures for a machine.")] = False,
) -> None:
    """Measure the loss on held-out data, `dataset_val` and `retention` of the config.

    Of a run, before and after training; of a config, its model as it is. With --tasks, accuracy
    and whatever else the tasks of lm_eval measure.

    Example: graphtune evaluate runs/quickstart

    Example: graphtune evaluate quickstart model.id=HuggingFaceTB/SmolLM2-360M-Instruct

    Example: graphtune evaluate runs/quickstart --tasks hellaswag,arc_easy --limit 200
    """
    options: dict[str, Any] = {
        "base": base,
        "chat": chat,
        "fewshot": fewshot,
        "limit": limit,
        "include_path": include_path,
        "output": output,
    }
    if tasks is not None:
        if overrides:
            raise UserError(f"{overrides[0]}: with --tasks there is no config that it could change")
        _run_tasks(target, tasks, batch_size=batch_size, as_json=as_json, **options)
        return
    for name, value in options.items():
        if value not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} is for tasks: say which with --tasks")
    _measure_loss(target, overrides or (), as_json)


def _measure_loss(target: str, overrides: Any, as_json: bool) -> None:
    from graphtune.config import SFTConfig, load_config, validate
    from graphtune.recipes.evaluate import evaluate_model, evaluate_run  # torch is slow to import

    if Path(target).is_dir():
        figures = evaluate_run(target, overrides)
    else:
        figures = evaluate_model(validate(load_config(target, overrides), SFTConfig))
    if as_json:
        print(json.dumps(figures))
        return
    names = ["", *figures]
    print("".join(f"{name:>22}" if index else f"{name:<22}" for index, name in enumerate(names)))
    for row in next(iter(figures.values())):
        values = "".join(f"{one[row]:>22.4f}" for one in figures.values())
        print(f"{row.replace('_', ' '):<22}{values}")


def _run_tasks(
    target: str, tasks: str, *, output: Path | None, as_json: bool, **options: Any
) -> None:
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks: name at least one, such as --tasks hellaswag,arc_easy")
    if output is not None and not output.resolve().parent.is_dir():
        raise UserError(f"-o {output}: there is no such folder")
    from graphtune.recipes.harness import evaluate_tasks  # torch and lm_eval are slow to import

    found = evaluate_tasks(target, names, **options)
    if output is not None:
        output.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(found["results"], default=str))
        return
    print(f"{'task':<30}{'examples':>9}  {'metric':<26}{'value':>10}{'stderr':>10}")
    for task, figures in found["results"].items():
        for metric, value, error in _rows(figures):
            shots = found["n-shot"].get(task, "")
            print(f"{task:<30}{shots!s:>9}  {metric:<26}{value:>10.4f}{error:>10}")


def _rows(figures: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Metric, value and standard error of a task; the filter of answers too, where one was used."""
    rows = []
    for key, value in figures.items():
        metric, _, filtered = key.partition(",")
        if metric.endswith("_stderr") or not isinstance(value, int | float) or not filtered:
            continue
        error = figures.get(f"{metric}_stderr,{filtered}")
        shown = f"{error:.4f}" if isinstance(error, float) else ""
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        rows.append((name, float(value), shown))
    return rows
