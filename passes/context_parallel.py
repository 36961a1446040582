"""ContextParallel: every rank has some of the tokens of each row.

Keys and values are gathered from all ranks (Dubey et al., The Llama 3 Herd of Models,
arXiv:2407.21783, section 3.3.2), which is exact for every mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh

from graphtune import exchange
from graphtune.distributed import Distribution, current_mesh, group_name
from graphtune.errors import UserError
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.passes.units import describe
from graphtune.rewrite import Edit
from graphtune.shapes import of_call
from graphtune.sites import Site, module_of

aten = torch.ops.aten
KEY = "passes.context_parallel"


@dataclass(frozen=True)
class ContextParallel(Pass):
    """Divides the tokens of each row over the axis `cp` of the mesh.

    Every rank is given whole rows, with their masks and positions, and computes the logits of its
    tokens: the first and the last of twice as many pieces as there are ranks, on the first rank,
    and so on inwards, so that a causal mask leaves as much work to each. Attention gathers keys
    and values of all tokens; the backward pass sums and scatters their gradients. Any mask does:
    windows, packed texts, padding. The loss is `graphtune.losses.ContextParallelCrossEntropy`, or
    that of `FusedLoss`.

    `fsdp` or `data_parallel` must follow: they sum the gradients over `cp`, too.

    Attributes:
        mesh: the run's mesh; None: that of `graphtune.distributed.make_mesh`.
    """

    mesh: DeviceMesh | None = None

    name: ClassVar[str] = "context_parallel"
    takes_images: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.DISTRIBUTE
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"context_parallel", "fsdp", "data_parallel", "fused_loss"}
    )

    @property
    def numerics(self) -> Numerics:
        return "lossy"  # the logits are those of some tokens

    @property
    def badge(self) -> str:
        return "cp"

    def options(self) -> dict[str, object]:
        """The mesh as the sizes of its axes."""
        return {**super().options(), "mesh": describe(self._mesh())}

    def _mesh(self) -> DeviceMesh:
        return self.mesh or current_mesh(KEY)

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        mesh = self._mesh()
        if mesh["cp"].size() == 1:
            raise UserError(f"`{KEY}` has one rank to divide over, cp=1; leave the pass out")
        attentions = list(_attentions(edit))
        if not attentions:
            raise UserError(f"`{KEY}`: the model has no attention whose tokens could be divided")
        sharing = _Sharing(edit, group_name(mesh, "cp"), {one.mask for one in attentions})
        sharing.attend(attentions)
        before = edit.distribution.parts if edit.distribution else {}
        edit.distribution = Distribution(mesh, before)
        names = {module_of(one.node)[0]: one.node for one in attentions}
        return [Site(name, "attention", node) for name, node in names.items()]


@dataclass(frozen=True)
class _Attention:
    """Where queries meet keys.

    Attributes:
        node: what reads the mask: attention as one operator, or the addition of its mask.
        mask: (batch or 1, heads or 1, queries, keys).
        gathered: of what reads keys or values, the node, the argument's place and the dimension
            that counts tokens.
    """

    node: fx.Node
    mask: fx.Node
    gathered: tuple[tuple[fx.Node, int, int], ...]


def _attentions(edit: Edit) -> Iterable[_Attention]:
    """Attention as one operator, and as a product, an added mask, a softmax and a product."""
    for node in list(edit.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if not isinstance(mask, fx.Node):
                raise UserError(f"`{KEY}`: {module_of(node)[0]} attends without a mask")
            yield _Attention(node, mask, ((node, 1, 2), (node, 2, 2)))
        elif node.target is aten.softmax.int and (found := _by_hand(node)) is not None:
            yield found


def _by_hand(softmax: fx.Node) -> _Attention | None:
    """The attention that a softmax belongs to; None: another kind of softmax."""
    added = softmax.args[0]
    if not isinstance(added, fx.Node) or added.target is not aten.add.Tensor:
        return None
    scores, mask = added.args
    product = scores
    while isinstance(product, fx.Node) and product.target is not aten.matmul.default:
        product = product.args[0] if product.op == "call_function" else None
    weighted = softmax
    while weighted.target is not aten.matmul.default:
        if len(weighted.users) != 1:
            return None
        (weighted,) = weighted.users
    if not isinstance(product, fx.Node) or not isinstance(mask, fx.Node):
        return None
    return _Attention(added, mask, ((product, 1, 3), (weighted, 1, 2)))


_WHOLE = (aten.sym_size.int, getattr, exchange.share_balanced)


class _Sharing:
    """A graph whose tokens are being divided: all but what masks are made of works on a share."""

    def __init__(self, edit: Edit, group: str, masks: set[fx.Node]) -> None:
        self.edit, self.group = edit, group
        self.ids, self.mask, self.positions = edit.graph.find_nodes(op="placeholder")
        self.of_masks = _behind(masks)
        with edit.after(self.positions, origin=self.ids):
            self.length = edit.call(aten.sym_size.int, self.ids, 1)
            shared = {
                one: edit.call(exchange.share_balanced, one, 1, 0, self.group)
                for one in (self.ids, self.positions)
            }
            self.own_length = edit.call(aten.sym_size.int, shared[self.ids], 1)
        self._masks: dict[fx.Node, fx.Node] = {}
        self._divide(shared)

    def _divide(self, shared: dict[fx.Node, fx.Node]) -> None:
        """Let what no mask is made of read the shares, and the number of tokens in one."""
        new = {*shared.values(), self.length, self.own_length}
        for node in list(self.edit.graph.nodes):
            if node in self.of_masks or node in new or node.op == "placeholder":
                continue
            for source in node.all_input_nodes:
                if source in shared:
                    node.replace_input_with(source, shared[source])
                elif source in self.of_masks and self._is_length(source):
                    node.replace_input_with(source, self.own_length)
        lengths = [n for n in self.edit.graph.nodes if n not in self.of_masks | new]
        for node in lengths:
            if self._is_length(node):
                node.replace_all_uses_with(self.own_length)

    def _is_length(self, node: fx.Node) -> bool:
        """Whether a node is the number of tokens of a row."""
        value = node.meta.get("val")
        same = isinstance(value, torch.SymInt) and isinstance(self.length.meta["val"], torch.SymInt)
        return same and str(value) == str(self.length.meta["val"]) and node is not self.length

    def attend(self, attentions: Iterable[_Attention]) -> None:
        """Gather keys and values, cut the masks' rows, and compute all shapes again."""
        gathered: dict[fx.Node, list[tuple[int, int]]] = {}
        masked = {one.node: one.mask for one in attentions}
        for one in attentions:
            for node, place, dim in one.gathered:
                gathered.setdefault(node, []).append((place, dim))
        for node in list(self.edit.graph.nodes):
            for place, dim in gathered.get(node, ()):
                self._gather(node, place, dim)
            if node in masked:
                node.replace_input_with(masked[node], self._rows(masked[node]))
            if node.op == "call_function":
                self._check(node)
                node.meta["val"] = of_call(node)

    def _gather(self, node: fx.Node, place: int, dim: int) -> None:
        source: Any = node.args[place]
        with self.edit.after(source):
            call = self.edit.call
            every = call(exchange.gather_balanced, source, dim, self.length, self.group)
        node.args = (*node.args[:place], every, *node.args[place + 1 :])

    def _rows(self, mask: fx.Node) -> fx.Node:
        if mask not in self._masks:
            with self.edit.after(max(mask, self.own_length)):
                self._masks[mask] = self.edit.call(exchange.share_balanced, mask, 2, 1, self.group)
        return self._masks[mask]

    def _check(self, node: fx.Node) -> None:
        reads_whole = node not in self.of_masks and node.target not in _WHOLE
        if reads_whole and any(map(self._is_stray, node.all_input_nodes)):
            raise UserError(
                f"`{KEY}`: {module_of(node)[0] or 'the model'} reads the mask of all tokens "
                "outside of attention, so its tokens cannot be divided"
            )

    def _is_stray(self, node: fx.Node) -> bool:
        """Whether a node is made of whole rows' tokens, and not one of sizes or devices."""
        return (
            node in self.of_masks
            and isinstance(node.meta["val"], Tensor)
            and self._has_tokens(node)
        )

    def _has_tokens(self, node: fx.Node) -> bool:
        return any(str(size) == str(self.length.meta["val"]) for size in node.meta["val"].shape)


def _behind(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes, and all that they are computed from."""
    found, stack = set(nodes), list(nodes)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found
