"""The weights of divided linears and embeddings: each rank's slice takes their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from graphtune.distributed import Part
from graphtune.errors import UserError
from graphtune.passes.adapters import last_output
from graphtune.passes.quantize import format_of
from graphtune.quantized_slices import slice_stored
from graphtune.rewrite import Edit
from graphtune.shapes import of_call, of_read
from graphtune.sites import Site
from graphtune.splitting import Partial, Split, Spread

aten = torch.ops.aten


class WeightSlices:
    """Slices the weights of sites, and notes how the graph's reads of them are split.

    Attributes:
        layouts: of the nodes that give what is sliced.
        special: what is to be done at nodes whose operator's rule does not do.
        parts: what this rank has, by the names of parameters and buffers.
    """

    def __init__(self, edit: Edit, spread: Spread, rank: int) -> None:
        self.edit, self.spread, self.rank = edit, spread, rank
        self.layouts: dict[fx.Node, Split] = {}
        self.special: dict[fx.Node, Callable[[Spread, fx.Node], Split | Partial | None]] = {}
        self.parts: dict[str, tuple[Part, ...]] = {}
        self._reads: dict[str, list[fx.Node]] = {}
        for read in edit.graph.find_nodes(op="get_attr"):
            self._reads.setdefault(str(read.target), []).append(read)

    def column(self, site: Site) -> None:
        """Keep this rank's outputs of a linear."""
        outputs = site.shape[0]
        pieces = _pieces(site, outputs)
        for size in pieces or (outputs,):
            self.spread.divide(site.node, size, "outputs")
        self._weight(site, 1 if site.transposed else 0, pieces)
        self._own(site, {"bias": 0, "lora_B": 0, "lora_magnitude_vector": 0}, pieces)

    def row(self, site: Site) -> None:
        """Keep of a linear what goes with this rank's inputs."""
        self.spread.divide(site.node, site.shape[1], "inputs")
        self._weight(site, 0 if site.transposed else 1, ())
        self._own(site, {"lora_A": 1}, ())

    def vocabulary(self, embeddings: Sequence[Site], heads: Sequence[Site]) -> list[Site]:
        """Keep of embeddings and the output head this rank's tokens of the vocabulary."""
        for site in (*embeddings, *heads):  # before any: a tied weight is divided with the first
            self._check_vocabulary(site)
        for site in heads:
            self.column(site)
        for site in embeddings:
            self._weight(site, 0, ())
            self.special[site.node] = self._look_up
        return [*embeddings, *heads]

    def _check_vocabulary(self, site: Site) -> None:
        if site.shape[0] % self.spread.size:
            raise UserError(
                f"`{self.spread.key}.vocab_parallel`: the mesh's tp={self.spread.size} does not "
                f"divide the {site.shape[0]} tokens of {site.name}; set it to false"
            )

    def _look_up(self, spread: Spread, node: fx.Node) -> Partial:
        """Let an embedding look up the ids that this rank has, and give zeros for others."""
        weight, ids, *rest = node.args
        count = spread.full(weight)[0] // spread.size
        call = self.edit.call
        with self.edit.after(node.prev, origin=node):
            local = call(aten.sub.Tensor, ids, self.rank * count)
            inside = call(
                aten.logical_and.default,
                call(aten.ge.Scalar, local, 0),
                call(aten.lt.Scalar, local, count),
            )
            index = call(aten.mul.Tensor, local, inside)
        if rest and rest[0] != -1:  # the padding token's row gets no gradient
            own = rest[0] - self.rank * count
            rest = [own if 0 <= own < count else -1, *rest[1:]]
        node.args = (weight, index, *rest)
        node.meta["val"] = of_call(node)
        with self.edit.after(node):
            known = call(aten.unsqueeze.default, inside, -1)
            rows = call(aten.mul.Tensor, node, known)
        node.replace_all_uses_with(rows, delete_user_cb=lambda user: user is not rows)
        spread.layouts[rows] = Partial()
        return Partial()

    def _weight(self, site: Site, dim: int, pieces: tuple[int, ...]) -> None:
        layout = Split(dim - 2, pieces)
        if format_of(site) is not None:
            self._stored(site, dim, pieces)
        else:
            self._slice(str(site.weight.target), dim, pieces)
        self.layouts[site.weight] = layout

    def _slice(self, name: str, dim: int, pieces: tuple[int, ...]) -> None:
        if name in self.parts:  # tied, or of a module that is called twice
            if [(p.dim, p.pieces) for p in self.parts[name]] != [(dim, pieces)]:
                raise UserError(f"`{self.spread.key}`: {name} would be divided in two ways")
            return
        size = self.edit.tensor(name).shape[dim]
        part = Part(dim, size, self.spread.size, self.rank, "tp", pieces)
        plain = None if pieces else part
        for one in self.edit.replace(name, lambda whole: part.padded(part.of(whole)), part=plain):
            self.parts[one] = (part,)
            self._now_reads(one)

    def _now_reads(self, name: str) -> None:
        for read in self._reads.get(name, ()):
            read.meta["val"] = of_read(self.edit.graph, self.edit.tensor(name))

    def _own(self, site: Site, dims: dict[str, int], pieces: tuple[int, ...]) -> None:
        """Slice what belongs to a linear besides its weight.

        Args:
            dims: by the last part of a name, or the first after the linear's, what it is cut along.
        """
        prefix = f"{site.name}."
        names = [n for n in (*self.edit.parameters, *self.edit.buffers) if n.startswith(prefix)]
        for name in names:
            inner = name.removeprefix(prefix).split(".")
            kind = inner[-1] if inner[0] == "modules_to_save" else inner[0]
            if kind in dims:
                self._slice(name, dims[kind], pieces)
        for read in (read for name in names for read in self._reads.get(name, ())):
            if read.target in self.parts and read not in self.layouts:
                dim = self.parts[str(read.target)][0].dim
                rank = read.meta["val"].dim()
                self.layouts[read] = Split(dim - rank, pieces)

    def _stored(self, site: Site, dim: int, pieces: tuple[int, ...]) -> None:
        """Slice a quantized weight."""
        node, kind = site.weight, format_of(site)
        assert kind is not None
        *given, shape, dtype = _stored_arguments(node)
        sizes = pieces or (shape[dim],)
        ranks, spans, start = self.spread.size, [], 0
        for size in sizes:
            first = start + self.rank * size // ranks
            spans.append((first, first + size // ranks))
            start += size
        try:
            own, cut = slice_stored(kind, shape, dim, spans)
        except ValueError as error:
            raise UserError(
                f"`{self.spread.key}`: the quantized weight of {site.name} cannot be divided over "
                f"tp={ranks}: {error}; do not quantize it, or leave it out of the targets"
            ) from None
        names = [str(read.target) for read in given]
        if names[0] not in self.parts:
            part = Part(dim, shape[dim], ranks, self.rank, "tp", pieces)
            values = self.edit.compute(names, cut, *names)
            for name, value in zip(names, values, strict=True):
                self.edit.add_buffer(name, value, persistent=self.edit.buffers[name][1])
                self.parts[name] = (part,)
        for read in given:
            self._now_reads(str(read.target))
            read.meta["custom"] = {**read.meta["custom"], "format": own}
        local = [*shape]
        local[dim] //= ranks
        suffixes = [str(read.target).removeprefix(f"{site.parameter}_") for read in given]
        node.args = own.arguments(dict(zip(suffixes, given, strict=True)), local, dtype)
        node.meta["custom"] = {**node.meta["custom"], "format": own}
        node.meta["val"] = of_call(node)


def _stored_arguments(node: fx.Node) -> tuple:
    """The reads of what a quantized weight is kept in, its shape and its dtype."""
    reads = [one for one in node.args if isinstance(one, fx.Node)]
    value = node.meta["val"]
    return (*reads, tuple(value.shape), value.dtype)


def _pieces(site: Site, outputs: int) -> tuple[int, ...]:
    """Sizes of what a fused projection makes, read off how its result is taken apart; else ()."""
    borders: set[int] = {0, outputs}
    stack, seen = [last_output(site)], set()
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            value = user.meta.get("val")
            if user.target is aten.slice.Tensor and _is_last(user, 1):
                start, end = (*user.args[2:4], None, None)[:2]
                borders.update(slice(start, end).indices(outputs)[:2])
            elif user.target in _SPLITS and _is_last(user, 2):
                ends = torch.tensor([one.shape[-1] for one in value]).cumsum(0)
                borders.update(ends.tolist())
            elif user.target in _VIEWS and value.shape[-1] == outputs:
                stack.append(user)
    ordered = sorted(borders)
    sizes = tuple(b - a for a, b in zip(ordered, ordered[1:], strict=False))
    return sizes if len(sizes) > 1 else ()


_VIEWS = (aten.view.default, aten.reshape.default)
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


def _is_last(node: fx.Node, place: int) -> bool:
    """Whether the dimension among a node's arguments is the last one of its input."""
    dim = node.args[place] if len(node.args) > place else 0
    return dim in (-1, node.args[0].meta["val"].dim() - 1)
