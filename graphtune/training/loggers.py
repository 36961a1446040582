"""Where metrics go besides the run's own `metrics.jsonl`: trackers that people know, by name.

    loggers: {tensorboard: {}, wandb: {project: my-project}}

Each tracker is a package of its own, imported only if it is named. Its options are those of the
call that starts a run in it (`wandb.init`, `mlflow.start_run`, ...).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from graphtune.config import did_you_mean
from graphtune.errors import UserError

Metrics = Mapping[str, float | int]


class Logger(Protocol):
    """A place for metrics."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of optimizer step `step`, counted from 1."""

    def close(self) -> None:
        """Write what is pending, and end the run there."""


class Stdout:
    """One plain line for each step, for logs that are read later."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._console = Console()

    def log(self, step: int, metrics: Metrics) -> None:
        figures = "  ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        self._console.print(f"step {step}  {figures}", highlight=False, soft_wrap=True)

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder `tensorboard/`: `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], **options: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(**{"log_dir": str(folder / "tensorboard"), **options})

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; `mode: offline` needs no account."""

    def __init__(self, folder: Path, config: Mapping[str, Any], **options: Any) -> None:
        defaults = {"project": "graphtune", "name": folder.name, "dir": str(folder)}
        self._run = importlib.import_module("wandb").init(
            **{**defaults, "config": dict(config), **options}
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow, at `tracking_uri` or where `MLFLOW_TRACKING_URI` says."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        tracking_uri: str | None = None,
        experiment_name: str = "graphtune",
        **options: Any,
    ) -> None:
        self._mlflow = importlib.import_module("mlflow")
        if tracking_uri is not None:
            self._mlflow.set_tracking_uri(tracking_uri)
        self._mlflow.set_experiment(experiment_name)
        self._mlflow.start_run(**{"run_name": folder.name, **options})
        self._mlflow.log_dict(dict(config), "config.json")

    def log(self, step: int, metrics: Metrics) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Comet:
    """Comet; `online: false` writes an archive that can be uploaded later."""

    def __init__(self, folder: Path, config: Mapping[str, Any], **options: Any) -> None:
        comet = importlib.import_module("comet_ml")
        self._experiment = comet.start(**{"project_name": "graphtune", **options})
        self._experiment.set_name(folder.name)
        self._experiment.log_parameters(dict(config))

    def log(self, step: int, metrics: Metrics) -> None:
        self._experiment.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self._experiment.end()


class Trackio:
    """Trackio, which keeps runs on this machine: `trackio show`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], **options: Any) -> None:
        defaults = {"project": "graphtune", "name": folder.name, "embed": False}
        self._run = importlib.import_module("trackio").init(
            **{**defaults, "config": dict(config), **options}
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[..., Logger]] = {
    "stdout": Stdout,
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "comet": Comet,
    "trackio": Trackio,
}
_MODULES = {"comet": "comet_ml"}  # where it is not the logger's name
_PACKAGES = {"comet": "comet_ml", "mlflow": "mlflow-skinny"}


def check_loggers(names: Iterable[str]) -> None:
    """Raise UserError if there is no such logger, or its package is missing."""
    for name in names:
        if name not in LOGGERS:
            raise UserError(
                f"`loggers.{name}`: there is no such logger{did_you_mean(name, LOGGERS)}"
            )
        if name != "stdout" and not _is_installed(_MODULES.get(name, name)):
            package = _PACKAGES.get(name, name)
            raise UserError(f"`loggers.{name}` needs a package: pip install {package}")


class Loggers:
    """Several loggers as one; one that fails to close does not keep the others from it.

    Args:
        options: name of a logger -> its options.
        folder: of the run, made if missing; its name is the run's name in a tracker.
        config: the resolved config, which trackers show beside the metrics.

    Raises:
        UserError: a logger's package is missing, or it refuses its options.
    """

    def __init__(
        self,
        options: Mapping[str, Mapping[str, Any] | None],
        folder: Path,
        config: Mapping[str, Any],
    ) -> None:
        check_loggers(options)
        self._loggers: list[Logger] = []
        for name, own in options.items():
            try:
                self._loggers.append(LOGGERS[name](folder, config, **(own or {})))
            except Exception as error:  # each tracker has errors of its own
                first_line = str(error).strip().partition("\n")[0]
                raise UserError(f"`loggers.{name}` cannot start: {first_line}") from error

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = dict(_numbers(metrics))
        for logger in self._loggers:
            logger.log(step, numbers)

    def close(self) -> None:
        with ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)


def _numbers(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float | int]]:
    """Metrics as trackers take them: of groups `group/name`, of lists the ends of their range."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            for below, number in _numbers(value):
                yield f"{name}/{below}", number
        elif isinstance(value, Sequence):
            yield from ((f"{name}/min", min(value)), (f"{name}/max", max(value)))
        else:
            yield name, value


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # it is None in `sys.modules`: made unavailable
        return False
