"""Reports of runs: what they show is what the runs logged."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from graphtune.errors import UserError
from graphtune.training.report import write_report
from graphtune.training.run import Run


def a_run(folder: Path, lr: float, steps: int = 5) -> Run:
    run = Run.create(folder, f"seed: 0\nmodel: {{id: a/<b>}}\noptimizer: {{lr: {lr}}}\n")
    for step in range(1, steps + 1):
        run.log({"step": step, "loss": 3.0 / step, "lr": lr})
    if steps:
        run.log({"step": steps, "heldout_loss": 0.5})
    run.write_summary({"after": {"heldout_loss": 0.5}, "train": {"steps": steps}})
    return run


def test_a_page_shows_results_and_differences(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "slow", 1e-4), a_run(tmp_path / "fast", 1e-3, steps=30)]
    picture, page = write_report(runs, tmp_path / "out")
    assert Image.open(picture).size[0] > 1000
    html = page.read_text()
    rows = dict(re.findall(r"<tr><th>([^<]*)</th>\s*((?:<td>[^<]*</td>\s*)+)</tr>", html))
    cells = {key: re.findall(r"<td>([^<]*)</td>", row) for key, row in rows.items()}
    assert cells["loss"] == ["0.6", "0.1"]
    assert cells["train.steps"] == ["5", "30"]
    assert cells["optimizer.lr"] == ["0.0001", "0.001"]
    assert "seed" not in cells  # they agree in it
    assert not re.search(r"""(src|href)=["'](?!#)""", html.replace("xlink:href", ""))
    svg = html[html.index("<svg") : html.index("</svg>") + 6]
    ElementTree.fromstring(svg)
    assert "slow" in html and "fast" in html


def test_one_run_shows_its_config_escaped(tmp_path: Path) -> None:
    _, page = write_report([a_run(tmp_path / "one", 1e-4)], tmp_path / "one")
    assert "<td>a/&lt;b&gt;</td>" in page.read_text()


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metrics"):
        write_report([a_run(tmp_path / "none", 1e-4, steps=0)], tmp_path)
