"""A run's folder: what `train` writes, and what `generate` and `export` read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphtune.errors import UserError

CONFIG = "config.yaml"


class Run:
    """The folder of one run.

    `config.yaml` is the resolved config, `metrics.jsonl` one line for each logged step,
    `samples.jsonl` answers on the way, `loss.png` the loss curve, `summary.json` results and
    timings once it has ended, `checkpoints/` what the run can go on from, `adapter/` the adapter
    in PEFT's layout, or `model/` the weights in Hugging Face's if all of them were trained. What
    `quantize` made is a program, `model.gt`.
    """

    def __init__(self, folder: str | Path, *, writes: bool = True) -> None:
        """
        Args:
            folder: of the run.
            writes: False on all ranks but one: what they would write is the same, and is left out.
        """
        self.folder = Path(folder)
        self.writes = writes

    @classmethod
    def create(
        cls, folder: str | Path, config: str, *, resume: bool = False, writes: bool = True
    ) -> Run:
        """Start a run, or go on with the one that lies there.

        Args:
            folder: made if missing.
            config: the resolved config, as YAML.
            resume: the folder may hold a run already.
            writes: False to write nothing, and to look at nothing.

        Raises:
            UserError: the folder holds files already.
        """
        run = cls(folder, writes=writes)
        if not writes:
            return run
        if not resume:
            run.refuse_used()
        run.folder.mkdir(parents=True, exist_ok=True)
        run.write(CONFIG, config)
        return run

    def refuse_used(self) -> None:
        """Raise UserError if the folder cannot take a new run; nothing is written."""
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(
                f"`output_dir={self.folder}` holds another run already; choose a new folder, or go "
                "on with that run: `resume=auto`"
            )

    def rewind(self, step: int) -> None:
        """Forget what came after a step, when a run goes on from there: lines, and results."""
        if not self.writes:
            return
        for file in (self.metrics_file, self.samples_file):
            if file.is_file():
                kept = [line for line in _lines(file) if line["step"] <= step]
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
                self.write(file.name, text)
        self.summary_file.unlink(missing_ok=True)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open a run that `train` wrote.

        Raises:
            UserError: there is none.
        """
        run = cls(folder)
        if not (run.folder / CONFIG).is_file():
            raise UserError(
                f"{folder} is not a run: it has no {CONFIG}; give the output_dir of a training run"
            )
        return run

    @property
    def config_file(self) -> Path:
        return self.folder / CONFIG

    @property
    def adapter_dir(self) -> Path:
        return self.folder / "adapter"

    @property
    def model_dir(self) -> Path:
        return self.folder / "model"

    @property
    def checkpoint_dir(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def trained_file(self) -> Path:
        return self.folder / "trained.safetensors"

    @property
    def program_file(self) -> Path:
        return self.folder / "model.gt"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.folder / "samples.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.folder / "summary.json"

    def write(self, name: str, text: str) -> None:
        """Write a file of the run, whole or not at all."""
        if not self.writes:
            return
        path = self.folder / name
        temporary = path.with_name(f".{name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self.write(self.summary_file.name, json.dumps(summary, indent=2) + "\n")

    def summary(self) -> dict[str, Any]:
        """What `write_summary` wrote; empty while the run has not ended."""
        file = self.summary_file
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to the metrics; it is there even if the process is killed right after."""
        if self.writes:
            _append(self.metrics_file, metrics)

    def log_sample(self, sample: Mapping[str, Any]) -> None:
        """Append a line to the samples, likewise."""
        if self.writes:
            _append(self.samples_file, sample)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines logged so far."""
        return _lines(self.metrics_file) if self.metrics_file.is_file() else []

    def plot_loss(self) -> None:
        """Draw the logged loss over the steps to `loss.png`."""
        from matplotlib.figure import Figure  # slow to import, used once in a run

        lines = [line for line in self.metrics() if "loss" in line]
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], lw=1.2)
        axes.set(xlabel="optimizer step", ylabel="training loss (nats per token)")
        axes.grid(alpha=0.3)
        figure.savefig(self.folder / "loss.png", dpi=120)


def _append(file: Path, line: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(line, ensure_ascii=False) + "\n")


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # the last one ended, or was cut off
