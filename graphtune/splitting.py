"""How a graph goes on once some of its weights are slices: the spread of a split along operators.

A pass says which weights a rank has only a slice of. From there this module walks the graph in its
order and works out what each result then is: whole (the same on all ranks), *split* along one
dimension, or *partial* (the ranks' results add up to it). Sizes that capture wrote into views are
made those of this rank, and where something needs what a rank has not, an exchange is inserted
(see `graphtune.exchange`). This is what DTensor does at run time, done once, in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from graphtune import exchange
from graphtune.errors import UserError
from graphtune.rewrite import Edit
from graphtune.shapes import of_call
from graphtune.sites import module_of
from graphtune.torch_private import is_fake, size_at, size_symbol

aten = torch.ops.aten
# What an adapter does to its input, until its second half.
_FIRST_HALF = (aten.to.dtype, aten.dropout.default, aten.linear.default)
# What shapes are compared at: primes that are no size of a model, so that products are equal only
# where the dimensions are.
_ROWS, _TOKENS = 7919, 104729


@dataclass(frozen=True)
class Split:
    """A result of which this rank has a part.

    Attributes:
        dim: the dimension, counted from the end.
        pieces: sizes, of the whole, of the parts of that dimension that are split one by one:
            q, k and v of a fused projection; one for most.
        sequence: whether the dimension is that of tokens, whose number is not known.
    """

    dim: int
    pieces: tuple[int, ...] = ()
    sequence: bool = False


@dataclass(frozen=True)
class Partial:
    """A result that is the sum over the ranks of what each of them has.

    Attributes:
        biases: nodes, whole, that are still to be added to the sum.
    """

    biases: tuple[fx.Node, ...] = ()


Layout: TypeAlias = Split | Partial
Rule: TypeAlias = "Callable[[Spread, fx.Node], Any]"


class Spread:
    """Rewrites a graph in which some nodes are slices.

    Attributes:
        layouts: of the nodes that are not whole; a list for a node that gives several tensors.
    """

    def __init__(
        self,
        edit: Edit,
        rules: Callable[[fx.Node], Rule | None],
        key: str,
        axis: str,
        size: int,
        group: str,
        *,
        sequence: bool,
    ) -> None:
        """Prepare for a graph.

        Args:
            rules: the rule of a node's operator (see `graphtune.split_rules`), or None.
            key: of the pass, for errors, such as `passes.tensor_parallel`.
            axis, size, group: the mesh axis, its number of ranks, and the name of its group.
            sequence: sums are left split along the tokens where the next operators can take
                it so (sequence parallel).
        """
        self.edit, self.rules, self.key, self.axis = edit, rules, key, axis
        self.size, self.group = size, group
        self.sequence = sequence
        self.layouts: dict[fx.Node, Any] = {}
        self._made: dict[tuple[str, fx.Node], fx.Node] = {}
        self._ids, _, self._last_input = edit.graph.find_nodes(op="placeholder")
        self._length: fx.Node | None = None
        batch, tokens = self._ids.meta["val"].shape
        self._symbols = {str(size_symbol(batch)): _ROWS, str(size_symbol(tokens)): _TOKENS}
        self._full = {node: self._shapes(node) for node in edit.graph.nodes}
        self._trains = depending_on_trained(edit)
        self._constants: set[fx.Node] = set(edit.graph.find_nodes(op="get_attr"))
        for node in edit.graph.nodes:
            sources = node.all_input_nodes if node.op == "call_function" else []
            if sources and self._constants.issuperset(sources):
                self._constants.add(node)

    def _shapes(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        return self.shape_of(value) if is_fake(value) else None

    def shape_of(self, value: Tensor) -> tuple[int, ...]:
        """A traced shape, tokens being large primes."""
        return tuple(size_at(size, self._symbols) for size in value.shape)

    def full(self, node: fx.Node) -> tuple[int, ...]:
        """Shape that a node had before anything was split, tokens being large primes."""
        if node not in self._full:
            self._full[node] = self.shape_of(node.meta["val"])
        return self._full[node]

    def run(
        self, slices: Mapping[fx.Node, Split], special: Mapping[fx.Node, Rule], *, gather: bool
    ) -> None:
        """Spread what the slices begin.

        Args:
            slices: nodes that are slices already, such as reads of weights.
            special: what to do at some nodes instead of the rule of their operator.
            gather: whether the output is to be whole.
        """
        for node in list(self.edit.graph.nodes):
            if node in slices:
                self.layouts[node] = slices[node]
            elif node.op == "output":
                node.args = (self._output(node.args[0], gather),)
            elif node.op == "call_function" and any(
                source in self.layouts for source in node.all_input_nodes
            ):
                self._visit(node, special.get(node))

    def _output(self, logits: fx.Node, gather: bool) -> fx.Node:
        split = self.layouts.get(logits)
        keep = isinstance(split, Split) and not split.sequence and not gather
        return logits if keep else self.whole(logits)

    def _visit(self, node: fx.Node, special: Callable | None) -> None:
        rule = special or self.rules(node)
        if rule is None:
            self._without_rule(node)
            return
        layout = rule(self, node)
        node.meta["val"] = of_call(node)
        if layout is not None:
            self.layouts[node] = layout

    def _without_rule(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            layout = self.layouts.get(source)
            if isinstance(layout, Split) and not layout.sequence:
                self.refuse(node, f"{node.target} cannot work on part of its input")
        self.replace_inputs(node, self.whole)
        node.meta["val"] = of_call(node)

    def refuse(self, node: fx.Node, why: str) -> None:
        """Raise the error that tensor parallelism cannot be had at a node."""
        raise UserError(
            f"`{self.key}`: {module_of(node)[0] or 'the model'} cannot be split over "
            f"{self.axis}={self.size}: {why}; leave it out with a rule of `{self.key}.targets`, "
            "{sites: ..., skip: true}"
        )

    def replace_inputs(self, node: fx.Node, by: Callable[[fx.Node], fx.Node]) -> None:
        """Let a node read `by(source)` for each source that is not whole."""
        node.args, node.kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: by(n) if n in self.layouts else n
        )

    # What a result is made into, once for all that need it so.

    def _once(self, kind: str, node: fx.Node, make: Callable[[], tuple[fx.Node, Any]]) -> fx.Node:
        if (kind, node) not in self._made:
            with self.edit.after(node, origin=None):
                made, layout = make()
            self._made[kind, node] = made
            if node in self._trains:
                self._trains.add(made)
            if layout is not None:
                self.layouts[made] = layout
        return self._made[kind, node]

    def summed(self, node: fx.Node) -> fx.Node:
        """A partial result added up over the ranks: whole, or split along its tokens."""
        layout = self.layouts.get(node)
        if not isinstance(layout, Partial):
            return node

        def make() -> tuple[fx.Node, Layout | None]:
            last, new = node, None
            if self.sequence and self._has_tokens(node):
                last = self.edit.call(
                    exchange.reduce_scatter, node, node.meta["val"].dim() - 2, self.group
                )
                new = Split(-2, sequence=True)
            else:
                last = self.edit.call(exchange.all_reduce, node, self.group)
            for bias in layout.biases:
                bias = bias if new is None else self.entered(bias)
                last = self.edit.call(
                    aten.add.Tensor, last, self.edit.cast(bias, last.meta["val"].dtype)
                )
            return last, new

        made = self._once("summed", node, make)
        self._full[made] = self.full(node)
        return made

    def _has_tokens(self, node: fx.Node) -> bool:
        shape = self.full(node)
        return len(shape) == 3 and shape[1] == _TOKENS

    def tokens(self) -> fx.Node:
        """The number of tokens of a row."""
        if self._length is None:
            with self.edit.after(self._last_input):
                self._length = self.edit.call(aten.sym_size.int, self._ids, 1)
        return self._length

    def whole(self, node: fx.Node) -> fx.Node:
        """The result as all ranks have it when nothing is split."""
        node = self.summed(node)
        layout = self.layouts.get(node)
        if layout is None:
            return node
        if len(layout.pieces) > 1:
            self.refuse(node, "it makes several things at once, which are needed whole")
        return self._gathered(node, summed=False)

    def _gathered(self, node: fx.Node, *, summed: bool) -> fx.Node:
        layout = self.layouts[node]
        dim = node.meta["val"].dim() + layout.dim

        def make() -> tuple[fx.Node, None]:
            length: Any = self.full(node)[layout.dim]
            if layout.sequence:
                length = self.tokens()
            call = self.edit.call(exchange.all_gather, node, dim, length, summed, self.group)
            return call, None

        made = self._once(f"gathered {summed}", node, make)
        self._full[made] = self.full(node)
        return made

    def entered(self, node: fx.Node) -> fx.Node:
        """A result as it goes, whole, into work of which each rank does a part.

        Each rank's part of the work has a part of its gradient; here they are added up.
        """
        node = self.summed(node)
        layout = self.layouts.get(node)
        if layout is not None:
            return self._gathered(node, summed=True)
        if ("entered", node) in self._made or node not in self._trains:
            return self._made.get(("entered", node), node)
        if len(node.users) == 1 and self._only_hands_on(node):
            node.args = tuple(self.entered(a) if isinstance(a, fx.Node) else a for a in node.args)
            self._made["entered", node] = node
            return node
        made = self._once(
            "entered", node, lambda: (self.edit.call(exchange.sum_gradient, node, self.group), None)
        )
        self._made["entered", made] = made
        return made

    def is_entered(self, node: fx.Node) -> None:
        """Say that a whole result's gradient is added up already, further up."""
        self._made["entered", node] = node

    def _only_hands_on(self, node: fx.Node) -> bool:
        """Whether what a node is computed from is rather what goes into the ranks' work.

        So it is with what is computed from weights alone, and with the first half of an adapter,
        whose weight's gradient is smaller than that of its result; and with the cast and the
        dropout before it, which read what other linears read.
        """
        adapts = "adapter" in node.meta.get("custom", {}) and node.target in _FIRST_HALF
        return node.op == "call_function" and (adapts or node in self._constants)

    def entered_weights(self) -> list[str]:
        """Parameters that go nowhere but into the ranks' work, and take no sum by themselves.

        The sums of their gradients, which this module inserted, are taken out: the caller takes
        those of a layer together.
        """
        names = []
        for (kind, read), made in self._made.items():
            if kind == "entered" and read.op == "get_attr" and list(read.users) == [made]:
                made.replace_all_uses_with(read)
                self.edit.graph.erase_node(made)
                names.append(str(read.target))
        return list(dict.fromkeys(names))

    def part(self, node: fx.Node, dim: int) -> fx.Node:
        """This rank's part, along a dimension counted from the end, of a whole result."""
        positive = node.meta["val"].dim() + dim
        made = self._once(
            f"part {dim}",
            node,
            lambda: (self.edit.call(exchange.share, node, positive, self.group), None),
        )
        self._full[made] = self.full(node)
        return made

    def divide(self, node: fx.Node, size: int, what: str) -> int:
        """A size divided by the ranks."""
        if size % self.size:
            raise UserError(
                f"`{self.key}`: the mesh's {self.axis}={self.size} does not divide the {size} "
                f"{what} of {module_of(node)[0]}; choose a divisor of {size}"
            )
        return size // self.size


def depending_on_trained(edit: Edit) -> set[fx.Node]:
    """Nodes whose results get a gradient."""
    found: set[fx.Node] = set()
    for node in edit.graph.nodes:
        if node.op == "get_attr":
            parameter = edit.parameters.get(str(node.target))
            trains = parameter is not None and parameter.requires_grad
        else:
            trains = node.target is not aten.detach.default and any(
                source in found for source in node.all_input_nodes
            )
        if trains:
            found.add(node)
    return found
