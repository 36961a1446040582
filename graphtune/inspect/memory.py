"""How much memory a training step takes, found by running it on tensors that have none."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graphtune.distributed import size
from graphtune.losses import ROW_INPUTS, Loss, cross_entropy
from graphtune.models.images import image_model
from graphtune.recomputation import by_region
from graphtune.torch_private import TensorMode, fake_tensors
from graphtune.transient import recompute_in_backward

if TYPE_CHECKING:
    from graphtune.program import Program

MakeOptimizer = Callable[[list[nn.Parameter]], Any]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step holds when it holds the most.

    What FSDP's `offload` keeps in the CPU's memory is not among them.

    Attributes:
        parameters: of the model and of adapters, and its buffers (quantized weights are such).
        gradients: of what trains, while the optimizer steps.
        optimizer: its state.
        activations: the rest of the peak: what is kept for the backward pass, and what operators
            make and let go of.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        rows = {
            name: getattr(self, name)
            for name in ("parameters", "gradients", "optimizer", "activations", "total")
        }
        return "\n".join(f"{name:<12}{size / 2**20:>12,.1f} MiB" for name, size in rows.items())


def estimate(
    program: Program, batch: int, seq: int, *, optimizer: MakeOptimizer | None = None
) -> MemoryEstimate:
    """The peak of forward, loss, backward and optimizer step on a batch of this shape.

    Every operator runs on shape-only tensors, as it would without a compiler, and each storage is
    counted from when it is made until the last that needs it is gone. A compiled step fuses
    operators and so takes less for activations: for it this is a bound from above. The
    allocator's own slack, and what is not a tensor, are not counted.

    Args:
        program: on any device, also `meta`; nothing of it is changed or read.
        batch, seq: rows, and tokens per row.
        optimizer: called with the list of parameters that train; by default AdamW.
    """
    return _measure(program, (batch, seq), optimizer)


def held(program: Program, *, optimizer: MakeOptimizer | None = None) -> MemoryEstimate:
    """What a step of any shape holds: as `estimate`, in a fraction of the time, with no
    activations."""
    return _measure(program, None, optimizer)


def _measure(
    program: Program, shape: tuple[int, int] | None, optimizer: MakeOptimizer | None
) -> MemoryEstimate:
    make = optimizer or (lambda parameters: torch.optim.AdamW(parameters))
    with _only_new_garbage(), fake_tensors():
        tensors = empty_tensors(program)
        trainable = [t for t in tensors.values() if isinstance(t, nn.Parameter) and t.requires_grad]
        inputs = None if shape is None else empty_batch(program, *shape)
        with _Live() as live:
            live.count(tensors.values())
            parameters = live.now
            stepper = make(trainable)
            _optimize(stepper, trainable)  # its state is made by its first step
            gc.collect()
            state = live.now - parameters
            gradients = _bytes(t for t in trainable if not t.is_meta)
            live.peak = parameters + gradients + state
            if inputs is not None:
                loss_on_shapes(program, tensors, inputs).backward()
                gc.collect()
                stepper.step()
    return MemoryEstimate(
        parameters=parameters,
        gradients=gradients,
        optimizer=state,
        activations=live.peak - parameters - gradients - state,
    )


def empty_tensors(program: Program) -> dict[str, Tensor]:
    """Parameters and buffers of a program's shapes, made in the mode that is on.

    Those that stay in the CPU's memory are on the meta device, as if that were it.
    """
    stay = program.distribution.offloaded if program.distribution else ()

    def empty(name: str, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device="meta" if name in stay else None)

    tensors: dict[str, Tensor] = {
        name: nn.Parameter(empty(name, p), requires_grad=p.requires_grad)
        for name, p in program.named_parameters()
    }
    return tensors | {name: empty(name, b) for name, b in program.named_buffers()}


def empty_batch(program: Program, batch: int, seq: int) -> Sequence[Tensor]:
    """What a program takes: every token has a label, and there are as many images as have room."""
    ids = torch.zeros(batch, seq, dtype=torch.int64)
    mask = torch.ones(batch, 1, seq, seq, dtype=torch.bool)
    inputs = [ids, mask, torch.zeros(batch, seq, dtype=torch.int64)]
    if program.takes_images:
        model = image_model(program.config)
        images = max(2, batch * (seq // model.tokens))
        inputs += model.blank(ids, images).values()
    if "rows" in program.inputs:
        chunks = int(program.inputs["rows"].shape[0])
        shares = size(program.distribution.mesh, "cp") if program.distribution else 1
        rows = max(2, -(-batch * seq // (chunks * shares)))
        inputs += [torch.zeros(chunks, rows, dtype=dtype) for dtype in ROW_INPUTS.values()]
    return inputs


def _optimize(optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def loss_on_shapes(
    program: Program,
    tensors: dict[str, Tensor],
    inputs: Sequence[Tensor],
    loss: Loss | None = None,
) -> Tensor:
    """The loss of a step without a compiler, to be differentiated.

    Args:
        tensors: see `empty_tensors`.
        inputs: see `empty_batch`.
        loss: of a program that gives logits; None: cross entropy of those that a rank has.
    """
    with recompute_in_backward():  # as the step does where nothing is compiled
        output = torch.func.functional_call(by_region(program).graph_module, tensors, tuple(inputs))
        if "rows" not in program.inputs:
            # A rank's logits may be those of some of the tokens.
            labels = inputs[0] if loss else inputs[0][:, : output.shape[1]]
            output = (loss or cross_entropy)(output, labels, None)
        return output.sum() / inputs[0].numel()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Within it `gc.collect` looks at what is made there, not at all the libraries' objects."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Live(TensorMode):
    """Counts the bytes of all storages that operators made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.count(x for x in tree_leaves(result) if isinstance(x, Tensor))
        return result

    def count(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._alive:
                self._alive.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size
