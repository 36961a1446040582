"""Find where a graph attends, what goes into it, and which keys each query sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphtune.errors import UserError
from graphtune.sites import Site, find_sites, module_of

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.bmm.default)
# What scores go through on their way from a product to the softmax, and weights on theirs from it.
_SCORES = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten.to.dtype,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.cat.default,
)
_WEIGHTS = (aten.to.dtype, aten.type_as.default, aten.dropout.default, aten.slice.Tensor)


@dataclass(frozen=True)
class Attention:
    """One attention of a graph.

    Attributes:
        name: qualified name of the module that attends.
        query, keys, values: (batch, heads, seq, channels), keys and values perhaps repeated.
        scores: the call that multiplies queries and keys; that of the fused operator, too.
        mixed: the call that multiplies weights and values; the same one where it is fused.
        masks: what says which keys each query sees, (batch or 1, ..., seq, seq): the call that
            reads it, and the mask.
    """

    name: str
    query: fx.Node
    keys: fx.Node
    values: fx.Node
    scores: fx.Node
    mixed: fx.Node
    masks: tuple[tuple[fx.Node, fx.Node], ...]

    @property
    def is_fused(self) -> bool:
        return self.scores is self.mixed

    @property
    def site(self) -> Site:
        return Site(self.name, "attention", self.mixed)


def find_attention(graph: fx.Graph) -> list[Attention]:
    """All attentions: fused ones, and those written out as product, softmax and product."""
    fused = [_fused(site) for site in find_sites(graph) if site.kind == "attention"]
    written = (_written_out(node) for node in graph.nodes if node.target is aten.softmax.int)
    return [*fused, *(one for one in written if one is not None)]


def _fused(site: Site) -> Attention:
    query, keys, values, *rest = site.node.args
    mask = rest[0] if rest else site.node.kwargs.get("attn_mask")
    masks = () if mask is None else ((site.node, mask),)
    return Attention(site.name, query, keys, values, site.node, site.node, masks)


def _written_out(softmax: fx.Node) -> Attention | None:
    path = _scores(softmax.args[0])
    if path is None:
        return None
    product = path[0]
    mixed = _mixed(softmax)
    turned = product.args[1]
    if mixed is None or turned.target is not aten.transpose.int:
        return None
    masks = [
        (holder, operand)
        for holder in path[1:]
        for operand in holder.all_input_nodes
        if operand not in path and _is_square(operand)
    ]
    name = module_of(product)[0]
    query, keys, values = product.args[0], turned.args[0], mixed.args[1]
    return Attention(name, query, keys, values, product, mixed, tuple(masks))


def _scores(node: Any) -> list[fx.Node] | None:
    """The calls from the product of queries and keys to `node`; None if there is none."""
    if node.target in _PRODUCTS:
        return [node] if _is_square(node) and node.meta["val"].dim() == 4 else None
    if node.target not in _SCORES:
        return None
    paths = (_scores(source) for source in node.all_input_nodes)
    return next(([*path, node] for path in paths if path is not None), None)


def _mixed(node: fx.Node) -> fx.Node | None:
    """The product of what `node` becomes with the values."""
    for user in node.users:
        if user.target in _PRODUCTS and user.args[0] is node:
            return user
        if user.target in _WEIGHTS and (found := _mixed(user)) is not None:
            return found
    return None


def _is_square(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 2:
        return False
    rows, columns = value.shape[-2:]
    return str(rows) == str(columns) and isinstance(rows, torch.SymInt)


def before_repeat(node: fx.Node) -> fx.Node:
    """Keys or values as they are before heads are repeated for the queries that share them.

    `node` itself, (batch, heads, seq, channels), where nothing is repeated.
    """
    if node.target is aten.repeat_interleave.self_int and node.args[2] in (1, -3):
        return node.args[0]
    if node.target not in (aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        return node
    expand = node.args[0]
    if expand.target in (aten.clone.default, aten.contiguous.default):
        expand = expand.args[0]
    if expand.target is not aten.expand.default or expand.meta["val"].dim() != 5:
        return node
    source = expand.args[0]
    while source.meta["val"].dim() == 5 and source.target in (
        aten.unsqueeze.default,
        aten.slice.Tensor,
    ):
        if source.target is aten.unsqueeze.default and source.args[1] in (2, -3):
            return _without_slices(source.args[0])
        source = source.args[0]
    return node


def _without_slices(node: fx.Node) -> fx.Node:
    """What `x[:, :, None]` took its (whole) slices of."""
    while node.target is aten.slice.Tensor and (
        str(node.args[0].meta["val"].shape) == str(node.meta["val"].shape)
    ):
        node = node.args[0]
    return node


@dataclass(frozen=True)
class Sight:
    """Which keys a query sees, of those that are not after it.

    Attributes:
        window: so many, up to itself; None: all.
        chunk: those of its own chunk of so many positions; None: all.
    """

    window: int | None = None
    chunk: int | None = None

    @property
    def reach(self) -> int | None:
        """How many keys a query sees at most."""
        return self.chunk if self.window is None else self.window


@dataclass(frozen=True)
class Mask:
    """What a mask of a graph says, and how.

    Attributes:
        sight: which keys are seen.
        form: `seen`, True at keys that are seen; `hidden`, True at the others; `added`, zero at
            keys that are seen and very negative at the others.
    """

    sight: Sight
    form: str


_COMPARED = ("lt", "le", "gt", "ge", "sub", "add", "rsub", "floor_divide", "div", "remainder")
_LONGEST = 8192  # a mask of so many rows and columns is read in moments


def read_mask(node: fx.Node, tensors: Mapping[str, Tensor], length: int, where: str) -> Mask:
    """Find out what a mask says by computing it, for a causal attention mask of one row.

    Args:
        node: bool or floating, (batch or 1, ..., seq, seq).
        tensors: what the graph reads, by name.
        length: of the longest sequence; windows and chunks of that length or more are none.
        where: the module that the mask is for, which errors name.

    Raises:
        UserError: it is none of the kinds of `Sight`.
    """
    order = _ancestors(node)
    if any(one.op == "get_attr" and _is_parameter(one, tensors) for one in order):
        raise _unknown(where)  # biases that are learned
    limits = [limit for limit in _constants(order) if limit < length]
    if any(limit > _LONGEST for limit in limits):
        raise UserError(
            f"`passes.kv_cache.length={length}`: {where} has a window of {max(limits)} tokens; "
            f"windows between {_LONGEST} and the length cannot be cached"
        )
    size = max([8, *(limit + 3 for limit in limits)])
    value = _evaluate(order, tensors, size)
    value = value.reshape(-1, *value.shape[-2:])
    table = value[0]
    if len(value) > 1 and not bool((value == table).all()):
        raise _unknown(where)
    if table.is_floating_point():
        form, seen = "added", table == 0
        if not bool((table[~seen] < -1e4).all()):
            raise _unknown(where)
    else:
        table = table.bool()
        form, seen = ("seen", table) if bool(table[0, 0]) else ("hidden", ~table)
    return Mask(_sight(seen, where), form)


def _sight(seen: Tensor, where: str) -> Sight:
    index = torch.arange(len(seen), device=seen.device)
    before = index[:, None] - index
    causal = before >= 0
    if torch.equal(seen, causal):
        return Sight()
    window = int(seen[-1].sum())
    if torch.equal(seen, causal & (before < window)):
        return Sight(window=window)
    alone = (seen.sum(-1) == 1).nonzero().flatten()
    if len(alone) > 1:
        chunk = int(alone[1])
        if torch.equal(seen, causal & (index[:, None] // chunk == index // chunk)):
            return Sight(chunk=chunk)
    raise _unknown(where)


def _is_parameter(node: fx.Node, tensors: Mapping[str, Tensor]) -> bool:
    tensor = tensors.get(node.target)
    return isinstance(tensor, nn.Parameter) or (tensor is not None and tensor.is_meta)


def _unknown(where: str) -> UserError:
    return UserError(
        f"`passes.kv_cache`: {where} sees other tokens than all before it, the last few or those "
        "of its chunk, or weighs them by their distance, which a cache of this kind cannot follow"
    )


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """A node and all that it is computed from, in the order of the graph."""
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return [one for one in node.graph.nodes if one in found]


def _constants(nodes: list[fx.Node]) -> Iterator[int]:
    for node in nodes:
        name = getattr(node.target, "__name__", "").split(".")[0]
        if name in _COMPARED:
            yield from (a for a in node.args if type(a) is int and a > 1)


@torch.no_grad()
def _evaluate(nodes: list[fx.Node], tensors: Mapping[str, Tensor], size: int) -> Tensor:
    ids = torch.zeros(1, size, dtype=torch.int64)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones(1, 1, size, size, dtype=torch.bool).tril(),
        "position_ids": torch.arange(size)[None],
    }
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            values[node] = inputs[node.target]
        elif node.op == "get_attr":
            tensor = tensors.get(node.target)
            values[node] = False if tensor is None else tensor.cpu()
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values[nodes[-1]]
