"""What ranks must exchange in a step, by the formulas of each technique's paper.

It is read off the program as it was before it was spread: which weights there are and where they
are used, what is between the blocks, and which of it gets a gradient. So it says nothing of how
the passes do it, and what they really send can be held against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from graphtune.distributed import DATA_AXES, Distribution, size, wide
from graphtune.inspect.traffic import Amount, Exchange, Kind, Phase, Traffic
from graphtune.recomputation import RECOMPUTE, constants
from graphtune.rewrite import Edit
from graphtune.sites import Site, layer_of, module_of, output_head
from graphtune.splitting import depending_on_trained
from graphtune.tensor_plan import find_blocks
from graphtune.torch_private import size_at, size_symbol

if TYPE_CHECKING:
    from graphtune.program import Program

aten = torch.ops.aten


def expected(whole: Program, program: Program, batch: int, seq: int) -> Traffic:
    """The exchanges of `traffic`, by theory.

    Args:
        whole: the program before it was spread.
        program: it after, with passes of the loss and of checkpoints, too.
        batch, seq: as of `traffic`.
    """
    return _Theory(whole, program, batch, seq).total() if program.distribution else {}


class _Theory:
    """Adds up exchanges, technique by technique."""

    def __init__(self, whole: Program, program: Program, batch: int, seq: int) -> None:
        assert program.distribution is not None
        self.edit = Edit(whole, "theory")
        self.program = program
        self.distribution: Distribution = program.distribution
        self.mesh = self.distribution.mesh
        self.tensors = program.all_parameters() | {
            name: buffer for name, (buffer, _) in program.all_buffers().items()
        }
        self.options = {row.name: dict(row.options) for row in program.ledger}
        rows, tokens = self.edit.graph.find_nodes(op="placeholder")[0].meta["val"].shape
        pieces = 2 * size(self.mesh, "cp")
        own = seq if pieces == 2 else 2 * math.ceil(seq / pieces)
        self.symbols = {str(size_symbol(rows)): batch, str(size_symbol(tokens)): own}
        self.trains = depending_on_trained(self.edit)
        self.fixed = constants(self.edit.graph)
        self.again = {
            layer_of(node)
            for node in program.graph.nodes
            if node.meta.get("recompute") == RECOMPUTE and node.meta.get("ac_graph_id", 0) > 1
        } - {None}
        self.found: dict[Exchange, Amount] = {}

    def total(self) -> Traffic:
        if "tensor_parallel" in self.options:
            self._tensor_parallel(self.options["tensor_parallel"])
        if "context_parallel" in self.options:
            self._context_parallel()
        kind = next((one for one in ("fsdp", "data_parallel") if one in self.options), None)
        if kind:
            sharded = self._fsdp(self.options[kind]) if kind == "fsdp" else set()
            dtype = _dtype(self.options[kind].get("reduce_dtype"))
            own = {n: tensor for n, tensor in self._trained() if n not in sharded}
            self._sum_gradients(own, wide(self.mesh, DATA_AXES), dtype)
        return {key: amount for key, amount in self.found.items() if amount.bytes}

    def _add(self, phase: Phase, axis: str, kind: Kind, size: int) -> None:
        key = Exchange(phase, axis, kind)
        self.found[key] = self.found.get(key, Amount()) + Amount(1, size)

    # Weights.

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((n, t) for n, t in self.tensors.items() if t.requires_grad)

    def _sum_gradients(
        self, wanted: Mapping[str, Tensor], axes: Iterable[str], dtype: torch.dtype | None
    ) -> None:
        """An all-reduce, over each axis, for what each unit is the first to read."""
        seen: set[int] = set()
        for reads in self._units():
            own = {id(wanted[n]): wanted[n] for n in reads if n in wanted}
            new = [one for key, one in own.items() if key not in seen]
            seen |= own.keys()
            for axis in axes if new else ():
                total = sum(t.numel() * (dtype or t.dtype).itemsize for t in new)
                self._add("backward", axis, "all-reduce", total)

    def _units(self) -> Iterable[dict[str, list[fx.Node]]]:
        """Of each layer, and of what is before and after them, the tensors read and by whom."""
        units: dict[str, dict[str, list[fx.Node]]] = {}
        last = ""
        for node in self.edit.graph.nodes:
            if node.op != "call_function" or node in self.fixed:
                continue
            layer = layer_of(node)
            last = layer or last
            reads = units.setdefault(layer or f"after {last}", {})
            for name in self._read_by(node):
                reads.setdefault(name, []).append(node)
        return units.values()

    def _read_by(self, node: fx.Node) -> Iterator[str]:
        """Names of the tensors that a node's constants are computed from."""
        stack = [source for source in node.all_input_nodes if source in self.fixed]
        while stack:
            source = stack.pop()
            stack += source.all_input_nodes
            if source.op == "get_attr":
                yield str(source.target)

    def _fsdp(self, options: dict[str, Any]) -> set[str]:
        """Weights are gathered to be used, and again to be used in the backward pass."""
        ranks = size(self.mesh, "dp_shard")
        parts = self.distribution.parts
        sharded = {n for n, of in parts.items() if any(one.axis == "dp_shard" for one in of)}
        before = self.edit.parameters
        for reads in self._units():
            groups: dict[torch.dtype | None, list[str]] = {}
            for name in sharded & reads.keys():
                key = before[name].dtype if self.tensors[name].requires_grad else None
                groups.setdefault(key, []).append(name)
            for dtype, names in groups.items():
                shards = {name: self.tensors[name] for name in names}
                sent = _dtype(options["param_dtype"]) or dtype if dtype else None
                gathered = ranks * sum(
                    t.numel() * (sent or t.dtype).itemsize for t in shards.values()
                )
                self._add("forward", "dp_shard", "all-gather", gathered)
                used = any(self._needed_again(user) for name in names for user in reads[name])
                if options["reshard_after_forward"] and used:
                    self._add("backward", "dp_shard", "all-gather", gathered)
                if dtype is None:
                    continue
                reduced = (_dtype(options["reduce_dtype"]) or sent or dtype).itemsize
                elements = sum(t.numel() for t in shards.values())
                self._add("backward", "dp_shard", "reduce-scatter", ranks * elements * reduced)
                for axis in wide(self.mesh, DATA_AXES):
                    if axis != "dp_shard":
                        self._add("backward", axis, "all-reduce", elements * reduced)
        return sharded

    def _needed_again(self, user: fx.Node) -> bool:
        """Whether the gradient of what a weight is applied to is computed from the weight."""
        inputs = [source for source in user.all_input_nodes if source not in self.fixed]
        return user.target is not aten.embedding.default and any(
            one in self.trains for one in inputs
        )

    # Activations.

    def _bytes(self, node: fx.Node, pieces: int = 0) -> int:
        """Of a node's result, its tokens padded to a multiple of `pieces`."""
        value = node.meta["val"]
        shape = [size_at(one, self.symbols) for one in value.shape]
        if pieces:
            place = next(i for i, one in enumerate(value.shape) if not isinstance(one, int) and i)
            shape[place] = math.ceil(shape[place] / pieces) * pieces
        return math.prod(shape) * value.dtype.itemsize

    def _divided(self, name: str) -> bool:
        """Whether the weight of a module is divided over `tp`."""
        return any(
            one.axis == "tp"
            for key, parts in self.distribution.parts.items()
            if key.startswith(f"{name}.")
            for one in parts
        )

    def _tensor_parallel(self, options: dict[str, Any]) -> None:
        """Sums after each block, and of the gradient before it; see TensorParallel."""
        sequence = bool(options["sequence_parallel"])
        ranks = size(self.mesh, "tp")
        pieces = ranks if sequence else 0
        blocks = [one for one in find_blocks(self.edit) if self._divided(one.row.name)]
        sites = {site.node: site for site in self.edit.sites("embedding", "linear")}
        head = output_head(self.edit.graph)
        for node, site in sites.items():
            if site.kind == "embedding" and self._divided(site.name):
                self._left(node, pieces, again=False)
            elif site.name == head and self._divided(site.name):
                self._entered(site.input, pieces, again=False)
        layers = [layer_of(block.row.node) for block in blocks]
        for index, block in enumerate(blocks):
            layer = layers[index]
            self._entered(block.columns[0].input, pieces, again=layer in self.again)
            last = layer not in layers[index + 1 :]  # nothing there needs its result
            self._left(block.row.node, pieces, again=layer in self.again and not last)
            for column in block.columns if sequence else ():
                for half in self._first_halves(column):  # gathered, too, as it is small
                    self._entered(half, pieces, again=layer in self.again)
        inside = [module_of(block.row.node)[0].rpartition(".")[0] for block in blocks]
        summed = {
            name: self.edit.parameters[name]
            for name, _ in self._trained()
            if not any(one.axis == "tp" for one in self.distribution.parts.get(name, ()))
            and (sequence or any(name.startswith(f"{one}.") for one in inside))
        }
        self._sum_gradients(summed, ["tp"], None)
        if head and self._divided(head):
            self._logits(options, ranks)

    def _first_halves(self, column: Site) -> Iterator[fx.Node]:
        """What adapters of a linear make of its input."""
        for node in self.edit.graph.find_nodes(op="call_function", target=aten.linear.default):
            own = module_of(node)[0] == column.name and "adapter" in node.meta.get("custom", {})
            if own and node.meta["val"].shape[-1] != column.node.meta["val"].shape[-1]:
                yield node

    def _entered(self, node: fx.Node, pieces: int, *, again: bool) -> None:
        amount = self._bytes(node, pieces)
        if pieces:
            self._add("forward", "tp", "all-gather", amount)
            if again:
                self._add("backward", "tp", "all-gather", amount)
        if node in self.trains:
            self._add("backward", "tp", "reduce-scatter" if pieces else "all-reduce", amount)

    def _left(self, node: fx.Node, pieces: int, *, again: bool) -> None:
        amount = self._bytes(node, pieces)
        kind: Kind = "reduce-scatter" if pieces else "all-reduce"
        self._add("forward", "tp", kind, amount)
        if again:
            self._add("backward", "tp", kind, amount)
        if pieces and node in self.trains:
            self._add("backward", "tp", "all-gather", amount)

    def _logits(self, options: dict[str, Any], ranks: int) -> None:
        """Logits of all ranks; or, for a loss of each rank's own, three numbers of each token."""
        logits = self.edit.graph.output_node().args[0]
        batch, tokens, vocabulary = (size_at(one, self.symbols) for one in logits.meta["val"].shape)
        if "fused_loss" in self.options:
            chunks, rows = self.options["fused_loss"]["chunks"], batch * tokens
            smooth = bool(self.options["fused_loss"]["label_smoothing"])
            for _ in range(chunks):
                self._loss(max(2, math.ceil(rows / chunks)), smooth=smooth)
        elif options["gather_logits"]:
            padded = math.ceil(vocabulary / ranks) * ranks
            amount = batch * tokens * padded * logits.meta["val"].itemsize
            self._add("forward", "tp", "all-gather", amount)
        else:
            self._loss(batch * tokens, smooth=False)

    def _loss(self, tokens: int, *, smooth: bool) -> None:
        self._add("forward", "tp", "all-reduce", tokens * 4)  # the largest
        # The sum of exponentials and the label's logit, and the sum of all.
        self._add("forward", "tp", "all-reduce", tokens * 4 * (3 if smooth else 2))

    def _context_parallel(self) -> None:
        """Keys and values of all tokens, and their gradients back."""
        shares = size(self.mesh, "cp")
        for site in self.edit.sites("attention"):
            ranks = size(self.mesh, "tp") if self._divided(site.name) else 1
            for node in site.node.args[1:3]:
                amount = self._bytes(node) * shares // ranks
                self._add("forward", "cp", "all-gather", amount)
                if layer_of(site.node) in self.again:
                    self._add("backward", "cp", "all-gather", amount)
                if node in self.trains:
                    self._add("backward", "cp", "reduce-scatter", amount)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
