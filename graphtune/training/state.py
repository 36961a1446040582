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
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from graphtune.distributed import data_rank, is_spread
from graphtune.engine import plan_hash
from graphtune.errors import UserError
from graphtune.program import Program
from graphtune.training.checkpoint_files import Snapshot, read_checkpoint, read_state
from graphtune.training.determinism import seed_everything
from graphtune.training.divided import Divided
from graphtune.training.flatten import copy_into, flatten, unflatten
from graphtune.training.ranks import gathered

DIVIDE = ("context_parallel", "data_parallel", "fsdp", "tensor_parallel")
"""Passes that say what a rank has: their number and kind may change."""

MAY_CHANGE = (
    "checkpoint*",
    "compile",
    "dataset_val*",
    "device",
    "early_stopping*",
    "epochs",
    "gradient_accumulation_steps",
    "loader.workers",
    "log_every",
    "loggers*",
    "max_steps",
    "mesh*",
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
`skip_spikes` is for a run that goes on before the spike that it met; gradients are accumulated over
more batches where there are fewer ranks.
"""

_SMALL = 2**16  # elements of a buffer that is saved in any case


class Stateful(Protocol):
    """A schedule, a data loader, averaged weights: what knows its own state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass
class TrainState:
    """What a run is made of; `snapshot` takes its state, `restore` gives it back.

    Of a run with several ranks all must call both. Each has the shards that it is to write, rank 0
    also what is the same on all. The run goes on with any number of ranks, each of which reads what
    it has of a tensor.

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
        self._divided = Divided(self.program)
        self._device = self.program.device

    def snapshot(self) -> Snapshot:
        """A copy of what this rank writes of the state as it is now, between optimizer steps.

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
        }
        states = gathered(self._rng_state())
        state["rng"] = states[0]
        if len(states) > 1:
            state["rng_of_others"] = states[1:]
        layouts: dict[str, Any] = {}

        def shard(path: str, value: Tensor) -> Tensor:
            return self._divided.shard(path, value, layouts)

        written = {name: flatten(value, tensors, name, shard) for name, value in state.items()}
        description = {
            "graphtune": version("graphtune"),
            "plan": plan_hash(self.program),
            "identity": self._identity(),
            "state": written,
        }
        if len(states) > 1:
            description["divided"] = layouts
        trained = sum(
            self._divided.whole_shape(name, p).numel() * p.itemsize
            for name, p in self._parameters.items()
        )
        return Snapshot(
            self.step,
            self._divided.own(tensors, layouts),
            description,
            trained,
            self._divided.file,
            self._divided.others(layouts),
        )

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
        description, tensors = read_checkpoint(folder, self._divided.wanted)
        self._check(description, folder)
        state = description["state"]

        def read(written: Any) -> Any:
            return unflatten(written, tensors, self._device)

        for name, written in state["parameters"].items():
            parameter = self._parameters[name]
            copy_into(parameter, unflatten(written, tensors, parameter.device))
        buffers = dict(self.program.named_buffers())
        for name, written in state["buffers"].items():
            value = unflatten(written, tensors, buffers[name].device)
            copy_into(buffers[name], value)
        for optimizer, written in zip(self.optimizers, state["optimizers"], strict=True):
            self._restore_optimizer(optimizer, written, tensors)
        for name, part in self.parts.items():
            part.load_state_dict(read(state["parts"][name]))
        self.step = description["step"]
        self.counters = read(state["counters"])
        self._restore_rng(read([state["rng"], *state.get("rng_of_others", ())]))

    def _buffers(self) -> dict[str, Tensor]:
        """Buffers that may be state rather than part of the base model.

        Statistics, which are small: all that are, since torch's batch norm writes to its own
        without counting. Of the large ones, which mostly are quantized weights, those whose count
        of writes has changed.
        """
        return {
            name: buffer
            for name, buffer in self.program.named_buffers()
            if self._divided.whole_shape(name, buffer).numel() <= _SMALL
            or self._untouched.get(name) != (id(buffer), buffer._version)
        }

    # Optimizers. State is kept by the name of its parameter, which, unlike its number, stays the
    # same when groups are ordered otherwise. It is put in place directly: `load_state_dict` casts
    # state to the dtype of the parameter, which is not always the one that it had.

    def _optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if _has_own_state(optimizer):
            if self._divided:
                raise UserError(
                    f"checkpoint: {type(optimizer).__name__} keeps state of its own, which cannot "
                    "be put together from the ranks'; take AdamW, or `passes.data_parallel`"
                )
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
        if "own" in written:
            optimizer.load_state_dict(unflatten(written["own"], tensors, self._device))
            return
        for group, saved in zip(optimizer.param_groups, written["groups"], strict=True):
            for key, value in unflatten(saved, tensors, self._device).items():
                if isinstance(group.get(key), Tensor):
                    copy_into(group[key], value)  # compiled steps may hold this very tensor
                else:
                    group[key] = value
        optimizer.state.clear()
        for name, values in written["state"].items():
            parameter = self._parameters[name]
            optimizer.state[parameter] = unflatten(values, tensors, parameter.device)

    # Random numbers: of Python, numpy, torch's CPU, and the device that computes (to ask others
    # would allocate memory on them).

    def _rng_state(self) -> dict[str, Any]:
        kind, keys, *rest = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (kind, np.asarray(keys).tolist(), *rest),
            "torch": torch.get_rng_state(),
            "devices": [
                torch.get_device_module(device).get_rng_state(device)
                for device in self._accelerators()
            ],
        }

    def _restore_rng(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on with this rank's; of another number of ranks only the first one's has a place."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if is_spread() else (0, 1)
        place, _ = data_rank()
        if len(states) != ranks and place > 0:
            seed = self.config.get("seed", 0) + 1_000_003 * self.step + place
            seed_everything(seed % 2**32)
            return
        state = states[rank if len(states) == ranks else 0]
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        for device, one in zip(self._accelerators(), state["devices"], strict=True):
            torch.get_device_module(device).set_rng_state(one.cpu(), device)

    def _accelerators(self) -> list[torch.device]:
        return [] if self._device.type == "cpu" else [self._device]

    def _identity(self) -> dict[str, Any]:
        """What must be the same in a run that goes on with this one's state."""
        return {
            "config": _plain(self.config),
            "passes": [
                [row.name, _plain(row.options)]
                for row in self.program.ledger
                if row.name not in DIVIDE
            ],
            "devices": [self._device.type],
            "parameters": {
                name: f"{str(p.dtype).removeprefix('torch.')} {list(shape)}"
                for name, p in self._parameters.items()
                for shape in [self._divided.whole_shape(name, p)]
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
                f"{folder} was written by graphtune {saved['graphtune']}, or on other ranks; with "
                f"{version('graphtune')} and these the run may not go on bit for bit",
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
    was, now = dict(leaves(was)), dict(leaves(now))
    may_change = (*MAY_CHANGE, *(f"passes.{name}*" for name in DIVIDE))
    different = [
        f"`{key.removeprefix('config.')}` was {was.get(key, 'absent')!r}, "
        f"is {now.get(key, 'absent')!r}"
        for key in {**was, **now}
        if was.get(key) != now.get(key)
        and not any(fnmatch.fnmatchcase(key, f"config.{pattern}") for pattern in may_change)
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


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What nested mappings and lists hold, with its keys joined by dots."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    if not items:
        yield path, value
    for key, item in items:
        yield from leaves(item, f"{path}.{key}" if path else str(key))
