"""Give a program its weights: streamed from a checkpoint, through what passes do to them.

A model that is loaded on the meta device has no weights. It can be captured, passes can be applied,
and all their errors come up, in seconds and without memory. `load_weights` then reads one tensor
after the other and lets each pass do its work on it, so that a model whose weights are quantized
never exists in full.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphtune.distributed import Part
from graphtune.errors import UserError
from graphtune.models.streaming import stream_weights
from graphtune.program import Fill, Program
from graphtune.verify import verify_claims


def load_weights(
    program: Program,
    *,
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Program:
    """Load the weights of a program that was captured from a model on the meta device.

    Args:
        program: captured from `load_model(..., device="meta")`, passes applied.
        device: where the weights go, but for those that FSDP keeps in the CPU's memory; None is
            torch's default device.
        revision: branch, tag or commit on the hub, as given to `load_model`.
        trust_remote_code: as given to `load_model`.

    Returns:
        A new program with weights; `program` itself stays empty.

    Raises:
        UserError: the program has its weights, its model has no source, or the checkpoint lacks
            a tensor or has one of another shape.
        VerificationError: a pass that claims to keep the logits changed them.
    """
    if program.deferred is None:
        raise UserError("load_weights: the program has its weights already")
    if program.source is None:
        raise UserError("load_weights: the model was not made by load_model, so has no source")
    device = torch.get_default_device() if device is None else torch.device(device)
    stream = stream_weights(
        program.source,
        program.config,
        revision=revision,
        trust_remote_code=trust_remote_code,
        parts=_parts(program),
    )
    return fill(program, stream, device)


def fill(program: Program, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> Program:
    """A program with the tensors that its checkpoint and its passes give.

    Args:
        program: on the meta device.
        weights: name and value of each tensor of the checkpoint, in any order; of one whose
            part is enough, perhaps only that.
        device: where they go.

    Raises: as `load_weights`.
    """
    assert program.deferred is not None
    filling = _Filling(program, device)
    for name, tensor in weights:
        filling.arrive(name, tensor)
        del tensor  # or it would be there until the next one has been read
    filling.finish()
    loaded = filling.program()
    verify_claims(program.deferred.claims, loaded)
    return loaded


class _Filling:
    """Tensors that have arrived, and what is still to be computed from them."""

    def __init__(self, program: Program, device: torch.device) -> None:
        assert program.deferred is not None
        self.empty = program
        self.device = device
        self.expected = dict(program.deferred.checkpoint)
        self.fills = list(program.deferred.fills)
        self.places = _places(program, device)
        self.aliases: dict[int, list[str]] = {}
        for name, tensor in self.expected.items():
            self.aliases.setdefault(id(tensor), []).append(name)
        self.values: dict[str, Tensor] = {}
        self.seen: set[str] = set()
        self.parts = _parts(program)
        self.in_part: set[str] = set()
        self.samples: dict[str, Tensor] = {}  # by name, for the fingerprint

    @torch.no_grad()
    def arrive(self, name: str, tensor: Tensor) -> None:
        if name not in self.expected:
            warnings.warn(
                f"the checkpoint has a tensor that the model has not: {name}", stacklevel=2
            )
            return
        expected = self.expected[name]
        part = self.parts.get(name)
        in_part = part is not None and tensor.shape == part.of(expected).shape
        if tensor.shape != expected.shape and not in_part:
            raise UserError(
                f"model.id: {name} of {self.empty.source} has shape {tuple(tensor.shape)}, the "
                f"model needs {tuple(expected.shape)}"
            )
        names = self.aliases[id(expected)]
        if self.seen.intersection(names):  # a checkpoint may hold a tied weight twice
            return
        tensor = tensor.to(self.device, expected.dtype)
        self.samples[names[0]] = _sample(tensor, expected.shape, part if in_part else None)
        self.in_part.update(names if in_part else ())
        self.seen.update(names)
        self._keep(names, [tensor] * len(names))
        self._compute_ready()

    def _compute_ready(self) -> None:
        """Run the fills whose inputs are there, and drop what nothing needs any more."""
        later: set[str] = set()  # names that a fill still waiting will write
        waiting = []
        for one in self.fills:
            ready = one.inputs and all(n in self.values and n not in later for n in one.inputs)
            if ready:
                self._run(one)
            else:
                waiting.append(one)
                later.update(one.outputs)
        self.fills = waiting
        needed = self.places.keys() | {name for one in waiting for name in one.inputs}
        self.values = {name: value for name, value in self.values.items() if name in needed}

    def _run(self, one: Fill) -> None:
        arguments: list[Any] = [self.values[n].to(self.device) for n in one.inputs] or [self.device]
        if one.part is not None and one.inputs[0] in self.in_part:
            self._keep(one.outputs, [one.part.padded(arguments[0])] * len(one.outputs))
        else:
            self._keep(one.outputs, one.compute(*arguments))

    def _keep(self, names: Iterable[str], tensors: Iterable[Tensor]) -> None:
        for name, tensor in zip(names, tensors, strict=True):
            place = self.places.get(name)
            fits = place is not None and place.shape == tensor.shape  # else a fill will shard it
            self.values[name] = place.copy_(tensor) if place is not None and fits else tensor

    @torch.no_grad()
    def finish(self) -> None:
        """Run what is left: random starts, in the order in which passes were applied."""
        missing = [name for name in self.expected if name not in self.seen]
        if missing:
            raise UserError(
                f"model.id: the checkpoint of {self.empty.source} lacks {missing[0]!r}"
                + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
            )
        for one in self.fills:
            self._run(one)

    def program(self) -> Program:
        empty = self.empty
        made: dict[int, nn.Parameter] = {}
        parameters = {}
        for name, parameter in empty.all_parameters().items():
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(self.values[name], parameter.requires_grad)
            parameters[name] = made[id(parameter)]
        stay = empty.distribution.offloaded if empty.distribution else ()
        buffers = {
            name: (value if name in stay else value.to(self.device), saved)
            for name, (buffer, saved) in empty.all_buffers().items()
            for value in [self.values.get(name, buffer)]
        }
        info = dataclasses.replace(empty.info, fingerprint=self._fingerprint())
        loaded = Program(empty.graph, parameters, buffers, info, empty.ledger)
        loaded.distribution = empty.distribution
        return loaded.train(empty.training)

    def _fingerprint(self) -> str:
        """As of the whole tensors, of which each rank has sampled its part."""
        of_axis: dict[str, list[str]] = {}
        for name in self.samples.keys() & self.in_part:
            of_axis.setdefault(self.parts[name].axis, []).append(name)
        for axis, names in sorted(of_axis.items()):
            assert self.empty.distribution is not None
            names = sorted(names)
            mine = torch.cat([self.samples[name] for name in names])
            whole = self.empty.distribution.sum(mine.int(), [axis]).short()
            lengths = [len(self.samples[name]) for name in names]
            self.samples |= dict(zip(names, whole.split(lengths), strict=True))
        return _combine((n, self.expected[n].shape, one) for n, one in self.samples.items())


def _parts(program: Program) -> dict[str, Part]:
    """The tensors of the checkpoint of which a part is enough: nothing else is made of them."""
    assert program.deferred is not None
    fills = program.deferred.fills
    readers = Counter(name for one in fills for name in one.inputs)
    return {
        name: one.part
        for one in fills
        if one.part is not None and readers[one.inputs[0]] == 1
        for name in one.outputs
        if name in program.deferred.checkpoint
    }


def _places(program: Program, device: torch.device) -> dict[str, Tensor]:
    """Memory for all that the program keeps, tied tensors in one place, by name.

    It is taken before the first weight is read: what stays, allocated in between what goes, would
    leave holes in the heap, almost as much again.
    """
    made: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = dict(program.all_parameters())
    tensors |= {name: b for name, (b, _) in program.all_buffers().items() if b.is_meta}
    stay = program.distribution.offloaded if program.distribution else ()
    for name, tensor in tensors.items():
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_like(
                tensor,
                device="cpu" if name in stay else device,
                requires_grad=False,
                pin_memory=name in stay and device.type == "cuda",
            )
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash that tells two checkpoints of one architecture apart.

    It is taken from up to 1,024 values of each tensor, rounded to bfloat16: the dtype that a
    checkpoint is loaded in does not matter, and a large model takes no longer than a second.
    """
    first: dict[int, str] = {}
    for name, tensor in tensors.items():  # a tied weight counts under its first name
        first.setdefault(id(tensor), name)
    named = ((name, tensors[name]) for name in first.values())
    return _combine((name, tensor.shape, _sample(tensor, tensor.shape)) for name, tensor in named)


@torch.no_grad()
def _sample(tensor: Tensor, shape: torch.Size, part: Part | None = None) -> Tensor:
    """Up to 1,024 values of a tensor of some shape, rounded to bfloat16, as int16.

    Args:
        part: what `tensor` is of it, if not the whole; where that has no value, the sample is 0.
    """
    count = min(shape.numel(), 1024)
    where = torch.linspace(0, shape.numel() - 1, count, dtype=torch.float64).long()
    there = torch.ones_like(where, dtype=torch.bool)
    index = list(torch.unravel_index(where, shape)) if part is not None else []
    if part is not None:
        there = (index[part.dim] >= part.start) & (index[part.dim] < part.stop)
        index[part.dim] = index[part.dim] - part.start
        values = tensor.detach()[tuple(one[there].to(tensor.device) for one in index)]
    else:
        values = tensor.detach().reshape(-1)[where.to(tensor.device)]
    sample = torch.zeros(count, dtype=torch.int16)
    sample[there] = values.to(torch.bfloat16).cpu().view(torch.int16)
    return sample


def _combine(samples: Iterable[tuple[str, torch.Size, Tensor]]) -> str:
    digests = {
        name: hashlib.sha256(f"{name}{tuple(shape)}".encode() + sample.numpy().tobytes())
        for name, shape, sample in samples
    }
    text = "\n".join(f"{name} {digests[name].hexdigest()}" for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
