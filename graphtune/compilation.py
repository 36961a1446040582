"""What of a training step `torch.compile` is given: the whole, or each distinct layer once.

Compiled whole, layers may be fused with their neighbours, and the time that it takes grows with
their number. Compiled layer by layer it takes as long for thirty layers as for two; the price is
a call of a compiled function for each layer, and that nothing is fused across their borders. Both
take batches of any size and length from the first call on, but for a batch of one row: a size of
1 is always a constant to `torch.compile`, which makes another graph of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from graphtune.cpu_matmul import matmul_options
from graphtune.errors import UserError
from graphtune.losses import Batch, Loss, loss_sum
from graphtune.outline import END, Outline, outline
from graphtune.program import Program
from graphtune.torch_private import compiled_graphs, size_symbol, vary

Compile: TypeAlias = bool | Literal["auto", "whole", "layers"]
WAYS = (True, False, "auto", "whole", "layers")

# Layers that need not be compiled, from which on it pays to compile layer by layer. Two graphs of
# one layer, and norm, head and loss, take as long as a whole of about three layers.
_SPARED = 3

# Inductor's own passes for the order in which operators run: exchanges between ranks start before
# what does not need them, and are waited for where they are needed, in the order it recommends.
_OVERLAP: dict[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": [
        "reorder_communication_preserving_peak_memory",
        "sink_waits_iterative",
        "reorder_communication_preserving_peak_memory",
    ],
}


# Round to bfloat16 wherever the graph says so: a compiler that holds scales in float32 throughout
# trains for other integers than those that are shipped.
ROUND: dict[str, Any] = {"emulate_precision_casts": True}


class Compiled:
    """The loss of a batch, compiled at the first call; see `TrainStep` for batches.

    Attributes:
        how: `whole` or `layers`.
        outline: the program's, with compiled layers; None if it is compiled whole.
        graphs: how many graphs were compiled (or found in a cache on disk) so far. It grows at
            the first call, with the first batch of one row, when gradients or the training mode
            are switched off, with the first batch of each of the program's graphs, and for no
            other sizes of a batch.
    """

    how: Literal["whole", "layers"]

    def __init__(
        self,
        program: Program,
        loss: Loss,
        how: Compile = "auto",
    ) -> None:
        """
        Args:
            loss: of logits, labels and weights.
            how: `whole`, `layers`, or what is quicker to start: `auto` or True.

        Raises:
            UserError: `layers`, and the graph has no numbered layers.
        """
        found = outline(program.graph_module) if how != "whole" else None
        if how == "layers" and not (found and found.calls):
            raise UserError("`compile=layers`: the model has no numbered layers; take `whole`")
        if how in ("auto", True) and found and len(found.calls) - len(found.regions) + 1 < _SPARED:
            found = None
        inputs = program.graph.find_nodes(op="placeholder")
        self.graphs = 0
        graphs = {"unmasked": program.unmasked, "packed": program.packed}
        self._make = {
            name: partial(Compiled, program.running(one), loss, how)
            for name, one in graphs.items()
            if one is not None
        }
        self._others: dict[str, Compiled] = {}
        self.varying = {str(node.target): _symbolic_dims(node.meta["val"]) for node in inputs}
        self.how = "whole" if found is None else "layers"
        self.outline = found
        options = matmul_options()
        if any(row.name == "qat" for row in program.ledger):
            options = options | ROUND
        if found is None:
            options = options | (_OVERLAP if program.distribution is not None else {})
            self._call = _compile(lambda batch: loss_sum(program, batch, loss), options)
        else:
            layered, end = _by_layer(program, found, loss, options)
            self._call = lambda batch: loss_sum(layered, batch, end)

    def __str__(self) -> str:
        if self.outline is None:
            return "compiled whole"
        layers, distinct = len(self.outline.calls), len(self.outline.regions) - 1
        return f"compiled by layer ({layers} layers, {distinct} distinct)"

    def __call__(self, batch: Batch) -> Tensor:
        name = "packed" if "documents" in batch else "unmasked"
        if name in self._make and (name == "packed" or batch.get("attention_mask") is None):
            if name not in self._others:
                self._others[name] = self._make[name]()
            other = self._others[name]
            before = other.graphs
            value = other(batch)
            self.graphs += other.graphs - before
            return value
        for name, tensor in batch.items():
            # Labels and weights are (batch, seq), and so is a mask that is not yet one of pairs.
            is_mask = name == "attention_mask" and tensor.dim() == 2
            vary(tensor, (0, 1) if is_mask else self.varying.get(name, (0, 1)))
        before = compiled_graphs()
        value = self._call(batch)
        self.graphs += compiled_graphs() - before
        return value


def _compile(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # Isolated, since all steps share the code of the functions that are compiled here, and what
    # is compiled of one code counts towards one limit.
    return torch.compile(  # its overloads leave the option out
        function,
        fullgraph=True,
        options=options,
        isolate_recompiles=True,  # type: ignore[call-overload]
    )


def _by_layer(
    program: Program, found: Outline, loss: Loss, options: dict[str, Any]
) -> tuple[Program, Loss]:
    """A program and a loss to be called one after the other, of compiled layers.

    Where the loss is not in the graph, it is compiled together with the graph's end, whose logits
    are large: the program then returns what the end takes.
    """
    outer, end = found.graph_module, found.regions[END]
    for name, region in found.regions.items():
        if name != END:
            outer._modules[name] = _Region(region, options)
    has_loss = "rows" in program.inputs

    def loss_of_end(*values: Any) -> Tensor:
        *values_of_end, labels, weights = values
        return loss(end(*values_of_end)[0], labels, weights)

    last = _Region(end, options, None if has_loss else loss_of_end)

    def run(*inputs: Tensor) -> Any:
        outer.training = program.training
        values = outer(*inputs)
        return last(*values)[0] if has_loss else values

    return program.running(run), lambda values, labels, weights: last(*values, labels, weights)


class _Region(nn.Module):
    """A region, compiled for inputs whose sizes vary where they are symbols.

    Args:
        options: of inductor.
        function: what is compiled instead, of the region's inputs and others.
    """

    def __init__(
        self,
        region: fx.GraphModule,
        options: dict[str, Any],
        function: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.compiled = _compile(function or region, options)
        values = [node.meta.get("val") for node in region.graph.find_nodes(op="placeholder")]
        self.symbolic = [
            (position, dims)
            for position, value in enumerate(values)
            if isinstance(value, Tensor) and (dims := _symbolic_dims(value))
        ]

    def forward(self, *inputs: Any) -> Any:
        for position, dims in self.symbolic:
            vary(inputs[position], dims)
        return self.compiled(*inputs)


def _symbolic_dims(value: Tensor) -> tuple[int, ...]:
    return tuple(dim for dim, size in enumerate(value.shape) if size_symbol(size) is not None)
