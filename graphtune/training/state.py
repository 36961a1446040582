"""All that a run needs to go on, bit for bit, as if it had never stopped."""

from __future__ import annotations

import fnmatch
import json
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from graphtune.engine import plan_hash
from graphtune.errors import UserError
from graphtune.program import Program
from graphtune.training.checkpoint_files import Snapshot, read_checkpoint, read_state
from graphtune.training.flatten import copy_into, flatten, unflatten

MAY_CHANGE = (
    "checkpoint*",
    "compile",
    "dataset_val*",
    "device",
    "early_stopping*",
    "epochs",
    "loader.workers",
    "log_every",
    "loggers*",
    "max_steps",
    "output_dir",
    "profile*",
    "resume",
    "retention*",
    "samples*",
    "skip_spikes*",
    "validate_every",
)
"""Config keys (patterns) that a resumed run may have otherwise than the run it goes on with.

Where a schedule's shape depends on the number of steps, another number bends it from there on.
`skip_spikes` is for a run that goes on before the spike that it met.
"""

_SMALL = 2**16  # elements of a buffer that is saved in any case


class Stateful(Protocol):
    """A schedule, a data loader, averaged weights: what knows its own state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass
class TrainState:
    """What a run is made of; `snapshot` takes its state, `restore` gives it back.

    Make it once weights are loaded, from a program that has not been trained yet.

    Attributes:
        program: its parameters that train are saved; what is frozen comes with the base model.
        optimizers: one or several, over parameters of the program.
        config: the resolved config, as plain dicts and lists.
        parts: what else has state, by name: `scheduler`, `loader`, `ema`, `scaler`. Of the state
            of each, tensors, numbers, strings, lists and dicts can be written.
        step: optimizer steps taken.
        counters: tokens, seconds, best metrics: what the recipe counts, of the same types.
    """

    program: Program
    optimizers: Sequence[Optimizer]
    config: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Stateful] = field(default_factory=dict)
    step: int = 0
    counters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._parameters = {n: p for n, p in self.program.named_parameters() if p.requires_grad}
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._untouched = {n: (id(b), b._version) for n, b in self.program.named_buffers()}
        self._devices = sorted({p.device for p in self._parameters.values()}, key=str)

    def snapshot(self) -> Snapshot:
        """A copy of the state as it is now, between two optimizer steps.

        Raises:
            UserError: some state is of a type that cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        state = {
            "parameters": dict(self._parameters),
            "buffers": self._buffers(),
            "optimizers": [self._optimizer_state(one) for one in self.optimizers],
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "counters": self.counters,
            "rng": self._rng_state(),
        }
        written = {name: flatten(value, tensors, name) for name, value in state.items()}
        description = {
            "graphtune": version("graphtune"),
            "plan": plan_hash(self.program),
            "identity": self._identity(),
            "state": written,
        }
        trained = sum(p.nbytes for p in self._parameters.values())
        return Snapshot(self.step, tensors, description, trained)

    def restore(self, folder: Path) -> None:
        """Go on where a checkpoint was taken.

        The last thing to do before the next step, as it also sets the random number generators.
        Tensors that were not on the CPU go to the device of what they belong to.

        Args:
            folder: a checkpoint, such as `latest` finds. Its hashes are not checked here.

        Raises:
            UserError: it was taken from a run with other passes, another config, or on another
                kind of device; naming what differs. Nothing has been changed then.
        """
        description, tensors = read_checkpoint(folder)
        self._check(description, folder)
        state = description["state"]
        device = self._devices[0]

        def read(written: Any) -> Any:
            return unflatten(written, tensors, device)

        for name, written in state["parameters"].items():
            parameter = self._parameters[name]
            copy_into(parameter, unflatten(written, tensors, parameter.device))
        buffers = dict(self.program.named_buffers())
        for name, written in state["buffers"].items():
            copy_into(buffers[name], unflatten(written, tensors, buffers[name].device))
        for optimizer, written in zip(self.optimizers, state["optimizers"], strict=True):
            self._restore_optimizer(optimizer, written, tensors)
        for name, part in self.parts.items():
            part.load_state_dict(read(state["parts"][name]))
        self.step = description["step"]
        self.counters = read(state["counters"])
        self._restore_rng(read(state["rng"]))

    def _buffers(self) -> dict[str, Tensor]:
        """Buffers that may be state rather than part of the base model.

        Statistics, which are small: all that are, since torch's batch norm writes to its own
        without counting. Of the large ones, which mostly are quantized weights, those whose count
        of writes has changed.
        """
        return {
            name: buffer
            for name, buffer in self.program.named_buffers()
            if buffer.numel() <= _SMALL
            or self._untouched.get(name) != (id(buffer), buffer._version)
        }

    # Optimizers. State is kept by the name of its parameter, which, unlike its number, stays the
    # same when groups are ordered otherwise. It is put in place directly: `load_state_dict` casts
    # state to the dtype of the parameter, which is not always the one that it had.

    def _optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if _has_own_state(optimizer):
            return {"own": optimizer.state_dict()}
        return {
            "groups": [
                {key: value for key, value in group.items() if key != "params"}
                for group in optimizer.param_groups
            ],
            "state": {self._name(p): values for p, values in optimizer.state.items()},
        }

    def _name(self, parameter: Tensor) -> str:
        if id(parameter) not in self._names:
            raise UserError("checkpoint: an optimizer has a parameter that does not train")
        return self._names[id(parameter)]

    def _restore_optimizer(
        self, optimizer: Optimizer, written: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        device = self._devices[0]
        if "own" in written:
            optimizer.load_state_dict(unflatten(written["own"], tensors, device))
            return
        for group, saved in zip(optimizer.param_groups, written["groups"], strict=True):
            for key, value in unflatten(saved, tensors, device).items():
                if isinstance(group.get(key), Tensor):
                    copy_into(group[key], value)  # compiled steps may hold this very tensor
                else:
                    group[key] = value
        optimizer.state.clear()
        for name, values in written["state"].items():
            parameter = self._parameters[name]
            optimizer.state[parameter] = unflatten(values, tensors, parameter.device)

    # Random numbers: of Python, numpy, torch's CPU, and the devices that parameters lie on (to
    # ask the others would allocate memory on them).

    def _rng_state(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (kind, np.asarray(keys).tolist(), *rest),
            "torch": torch.get_rng_state(),
            "devices": [
                torch.get_device_module(device).get_rng_state(device)
                for device in self._devices
                if device.type != "cpu"
            ],
        }

    def _restore_rng(self, state: Mapping[str, Any]) -> None:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        devices = [device for device in self._devices if device.type != "cpu"]
        for device, one in zip(devices, state["devices"], strict=True):
            torch.get_device_module(device).set_rng_state(one.cpu(), device)

    def _identity(self) -> dict[str, Any]:
        """What must be the same in a run that goes on with this one's state."""
        return {
            "config": _plain(self.config),
            "passes": [[row.name, _plain(row.options)] for row in self.program.ledger],
            "devices": [device.type for device in self._devices],
            "parameters": {
                name: f"{str(p.dtype).removeprefix('torch.')} {list(p.shape)}"
                for name, p in self._parameters.items()
            },
            "optimizers": [
                {
                    "type": f"{type(one).__module__}.{type(one).__qualname__}",
                    "groups": [[self._name(p) for p in g["params"]] for g in one.param_groups],
                }
                for one in self.optimizers
            ],
            "parts": sorted(self.parts),
        }

    def _check(self, saved: Mapping[str, Any], folder: Path) -> None:
        _refuse_another(saved["identity"], self._identity(), folder)
        if saved["plan"] != plan_hash(self.program):
            warnings.warn(
                f"{folder} was written by graphtune {saved['graphtune']}; with "
                f"{version('graphtune')} the run may not go on bit for bit",
                stacklevel=3,
            )


def saved_counters(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe had counted at a checkpoint; read before anything is loaded.

    Args:
        folder: the checkpoint.
        config: the resolved config of the run that is to go on from there.

    Raises:
        UserError: it cannot be read, or was taken from a run with another config.
    """
    saved = read_state(folder)
    was = {"config": saved["identity"]["config"]}
    _refuse_another(was, {"config": _plain(config)}, folder)
    counters = saved["state"]["counters"]
    return {name: value for name, value in counters.items() if isinstance(value, int | float)}


def _refuse_another(was: Any, now: Any, folder: Path) -> None:
    """Raise UserError, with what differs, if `now` cannot go on where `was` was."""
    was, now = dict(_leaves(was)), dict(_leaves(now))
    different = [
        f"`{key.removeprefix('config.')}` was {was.get(key, 'absent')!r}, "
        f"is {now.get(key, 'absent')!r}"
        for key in {**was, **now}
        if was.get(key) != now.get(key)
        and not any(fnmatch.fnmatchcase(key, f"config.{pattern}") for pattern in MAY_CHANGE)
    ]
    if different:
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        raise UserError(
            f"{folder} is of another run: {'; '.join(different[:3])}{more}; "
            "go on with what it was, or choose a new output_dir"
        )


def _has_own_state(optimizer: Optimizer) -> bool:
    """Whether an optimizer keeps state elsewhere than torch's do."""
    return type(optimizer).state_dict is not Optimizer.state_dict


def _plain(options: Any) -> Any:
    """Options as JSON has them, so that what was read back can be compared with what is."""
    return json.loads(json.dumps(options, default=str))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    if not items:
        yield path, value
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))
