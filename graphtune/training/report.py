"""Runs side by side: their curves as a picture, and a page that needs no other file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from graphtune.errors import UserError
from graphtune.training.run import Run

# A panel each, where a run has logged it: key of the metrics, and what the axis says.
PANELS = {
    "loss": "training loss (nats per token)",
    "heldout_loss": "held-out loss (nats per token)",
    "lr": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_s": "tokens per second",
    "peak_memory_bytes": "peak memory (bytes)",
}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
td, th { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; vertical-align: top }
svg { max-width: 100%; height: auto }
</style></head><body>
<h1>{{ title }}</h1>
{{ curves | safe }}
{% for caption, rows in tables if rows %}
<h2>{{ caption }}</h2>
<table><tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for key, cells in rows %}<tr><th>{{ key }}</th>
{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
</body></html>
"""


def write_report(runs: Sequence[Run], folder: Path) -> tuple[Path, Path]:
    """Write `report.png` and `report.html` about `runs` into `folder`, which is made if missing.

    The page holds the curves, what the runs ended with, and the config keys in which they differ
    (all of them, for one run). It loads nothing from elsewhere.

    Returns:
        The paths of the picture and of the page.

    Raises:
        UserError: no run has logged anything.
    """
    if not any(run.metrics() for run in runs):
        raise UserError(f"report: {runs[0].folder} has no metrics; did it stop before a step?")
    names = _names(runs)
    folder.mkdir(parents=True, exist_ok=True)
    picture, page = folder / "report.png", folder / "report.html"
    figure = _draw(dict(zip(names, runs, strict=True)))
    figure.savefig(picture, dpi=120)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    configs = [_flat(yaml.safe_load(run.config_file.read_text())) for run in runs]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    html = environment.from_string(_PAGE).render(
        title=f"graphtune: {', '.join(names)}",
        names=names,
        curves=svg[svg.index("<svg") :],
        tables=[
            ("Results", _table([_results(run) for run in runs])),
            ("Config, where it differs", _table(configs, differing=True))
            if len(runs) > 1
            else ("Config", _table(configs)),
        ],
    )
    page.write_text(html, encoding="utf-8")
    return picture, page


def _names(runs: Sequence[Run]) -> list[str]:
    """What to call each run: its folder's name, or its path if two have the same."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _draw(runs: Mapping[str, Run]) -> Any:
    from matplotlib.figure import Figure  # slow to import

    lines = {name: run.metrics() for name, run in runs.items()}
    present = [key for key in PANELS if any(key in line for own in lines.values() for line in own)]
    rows = -(-len(present) // 2)
    figure = Figure(figsize=(12, 3.4 * rows), layout="constrained")
    for place, key in enumerate(present, start=1):
        axes = figure.add_subplot(rows, 2, place)
        for name, own in lines.items():
            points = [(line["step"], line[key]) for line in own if key in line]
            few = "o-" if len(points) < 20 else "-"
            if points:
                axes.plot(*zip(*points, strict=True), few, lw=1.2, ms=3, label=name)
        axes.set(xlabel="optimizer step", ylabel=PANELS[key])
        axes.grid(alpha=0.3)
        if len(runs) > 1:
            axes.legend(fontsize="small")
    return figure


def _results(run: Run) -> dict[str, str]:
    """The last value of each metric, and the summary's figures."""
    last: dict[str, Any] = {}
    for line in run.metrics():
        last |= line
    return {key: _cell(value) for key, value in (last | _flat(run.summary())).items()}


def _table(
    columns: Sequence[Mapping[str, Any]], *, differing: bool = False
) -> list[tuple[str, list[str]]]:
    """Rows of a key and its value in each column; `differing` leaves out where all agree."""
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, [_cell(column.get(key, "")) for column in columns]) for key in keys]
    return [row for row in rows if not differing or len(set(row[1])) > 1]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    if not isinstance(node, Mapping) or not node:
        return {prefix: node} if prefix else {}
    return {
        key: value
        for name, child in node.items()
        for key, value in _flat(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
