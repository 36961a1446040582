"""The edit of a graph by `KVCache`: keys and values to buffers, and masks from positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from graphtune.attention_sites import (
    Attention,
    Mask,
    Sight,
    before_repeat,
    find_attention,
    read_mask,
)
from graphtune.errors import UserError
from graphtune.rewrite import Edit
from graphtune.shapes import propagate_all
from graphtune.sites import module_of

aten = torch.ops.aten
_END = 2**63 - 1


class Sizes(Protocol):
    """What is asked of `KVCache`."""

    @property
    def length(self) -> int: ...

    @property
    def batch(self) -> int: ...

    def ring(self, sight: Sight) -> int:
        """How many positions a layer keeps."""


class Rewriting:
    """The edit of one graph. What several layers read is computed once, before all of them."""

    def __init__(self, edit: Edit, options: Sizes) -> None:
        self.edit, self.options = edit, options
        self.ids, self.mask, self.positions = edit.graph.find_nodes(op="placeholder")
        self.attentions = find_attention(edit.graph)
        self.masks: dict[fx.Node, Mask] = {}
        for attention in self.attentions:
            for _, mask in attention.masks:
                if mask not in self.masks:
                    length, where = options.length, attention.name
                    self.masks[mask] = read_mask(mask, self._tensors(), length, where)
        self._fix_sizes()
        with edit.after(self.positions):
            places = edit.call(aten.clamp.default, self.positions, 0)
            self.device = edit.call(getattr, self.ids, "device")
        edit.replace_uses(self.positions, places)
        self.layers = self.device.next
        self.shared: dict[Any, fx.Node] = {}
        self.kept: dict[fx.Node, fx.Node] = {}

    def _tensors(self) -> dict[str, Tensor]:
        return self.edit.parameters | {name: one for name, (one, _) in self.edit.buffers.items()}

    def _fix_sizes(self) -> None:
        """Take sizes from the ids instead of the mask, and make the batch a number."""
        for node in self.edit.graph.find_nodes(op="call_function", target=aten.sym_size.int):
            source, dim = node.args
            if source not in (self.ids, self.mask, self.positions):
                continue
            if dim == 0 or (source is self.mask and dim == 1):
                _replace(node, 1 if dim else self.options.batch)
            else:
                node.args = (self.ids, 1)
        propagate_all(self.edit.graph, self._tensors(), self.options.batch)

    def finish(self) -> None:
        """Let go of the mask, and give each node the shape that it has now."""
        self.edit.graph.eliminate_dead_code()
        for user in self.mask.users:
            raise UserError(
                f"`passes.kv_cache`: {module_of(user)[0] or 'the model'} reads the attention mask "
                f"for something else than attention ({user.target}); generate without a cache"
            )
        self.edit.graph.erase_node(self.mask)
        propagate_all(self.edit.graph, self._tensors(), self.options.batch)

    def cache(self, attention: Attention) -> None:
        """Let one attention read its keys and values from buffers."""
        sight = _seen_by_all(
            attention.name, [self.masks[mask].sight for _, mask in attention.masks]
        )
        size = self.options.ring(sight)
        use = attention.scores if attention.is_fused else attention.scores.args[1]
        keys = self._keep(attention.keys, f"{attention.name}.key_cache", size, use)
        values = self._keep(
            attention.values, f"{attention.name}.value_cache", size, attention.mixed
        )
        if attention.is_fused:
            self._attend(attention, sight, keys, values)
        else:
            self._attend_written_out(attention, sight, keys, values)

    def _keep(self, node: fx.Node, name: str, size: int, use: fx.Node) -> fx.Node:
        """Write keys or values to a buffer (batch, heads, size, channels); returns its read.

        That comes right before their use: until then the model may write to the tensor itself.
        """
        new = before_repeat(node)
        if new in self.kept:  # layers may share them
            return self.kept[new]
        edit, batch = self.edit, self.options.batch
        shape = (batch, new.meta["val"].shape[1], size, new.meta["val"].shape[3])
        dtype = new.meta["val"].dtype
        (empty,) = edit.compute(
            [name], lambda device: (torch.zeros(shape, dtype=dtype, device=device),)
        )
        edit.add_buffer(name, empty, persistent=False)
        slots = self._slots(size)
        with edit.after(use.prev, origin=new):
            buffer, value = edit.read(name), edit.call(aten.detach.default, new)
            if batch == 1:
                indices = [None, None, edit.call(aten.select.int, slots, 0, 0)]
            else:
                indices = [self._rows(), None, slots]
                value = edit.call(aten.transpose.int, value, 1, 2)
            self.kept[new] = edit.call(aten.index_put_.default, buffer, indices, value)
        return self.kept[new]

    def _attend(self, attention: Attention, sight: Sight, keys: fx.Node, values: fx.Node) -> None:
        """Queries that share keys become more queries of one head: nothing is repeated."""
        edit, query = self.edit, attention.query
        batch, heads, _, channels = query.meta["val"].shape
        groups = keys.meta["val"].shape[1]
        visible = self._visible(sight, heads // groups)
        scale = attention.scores.kwargs.get("scale")
        with edit.after(attention.scores):
            if heads != groups:
                query = edit.call(aten.clone.default, query, memory_format=torch.contiguous_format)
                query = edit.call(aten.view.default, query, [batch, groups, -1, channels])
            mixed = edit.call(
                aten.scaled_dot_product_attention.default, query, keys, values, visible, scale=scale
            )
            if heads != groups:
                width = values.meta["val"].shape[3]
                # Laid out anew: whether it could be viewed as it is would depend on the length.
                mixed = edit.call(aten.clone.default, mixed, memory_format=torch.contiguous_format)
                apart = [batch, groups, heads // groups, self._count(), width]
                mixed = edit.call(aten.view.default, mixed, apart)
                mixed = edit.call(aten.flatten.using_ints, mixed, 1, 2)
        edit.replace_uses(attention.mixed, mixed)
        edit.graph.erase_node(attention.mixed)  # as random, it would never count as dead

    def _attend_written_out(
        self, attention: Attention, sight: Sight, keys: fx.Node, values: fx.Node
    ) -> None:
        """The same calls on all keys; shapes in between follow."""
        product = attention.scores
        heads = attention.query.meta["val"].shape[1]
        product.args[1].replace_input_with(attention.keys, self._repeated(keys, heads))
        attention.mixed.replace_input_with(attention.values, self._repeated(values, heads))
        for holder, mask in attention.masks:
            form, dtype = self.masks[mask].form, mask.meta["val"].dtype
            holder.replace_input_with(mask, self._in_form(sight, form, dtype))

    def _repeated(self, kept: fx.Node, heads: int) -> fx.Node:
        batch, groups, size, width = kept.meta["val"].shape
        if heads == groups:
            return kept
        with self.edit.after(kept):
            each = self.edit.call(aten.unsqueeze.default, kept, 2)
            shape = [batch, groups, heads // groups, size, width]
            each = self.edit.call(aten.expand.default, each, shape)
            return self.edit.call(aten.reshape.default, each, [batch, heads, size, width])

    # ------------------------------------------------------------- what layers have in common

    def _once(self, key: Any, make: Callable[[Callable[..., fx.Node]], fx.Node]) -> fx.Node:
        """What `make` inserts with the function it is given, once for all that name the key."""
        if key not in self.shared:
            with self.edit.after(self.layers.prev, origin=self.positions):
                self.shared[key] = make(self.edit.call)
        return self.shared[key]

    def _rows(self) -> fx.Node:
        """The number of each row, (batch, 1)."""

        def make(call: Callable[..., fx.Node]) -> fx.Node:
            rows = call(aten.arange.default, self.options.batch, device=self.device)
            return call(aten.unsqueeze.default, rows, 1)

        return self._once("rows", make)

    def _count(self) -> fx.Node:
        """How many new tokens each row has."""
        return self._once("count", lambda call: call(aten.sym_size.int, self.ids, 1))

    def _slots(self, size: int) -> fx.Node:
        """Where the new tokens go, (batch, n)."""
        if size == self.options.length:
            return self.positions  # the negative ones of padding count from the end
        return self._once(
            ("slots", size), lambda call: call(aten.remainder.Scalar, self.positions, size)
        )

    def _visible(self, sight: Sight, sharing: int = 1) -> fx.Node:
        """Which places each query sees: bool (batch, 1, sharing * n, size)."""
        plain = self._once(sight, lambda call: self._compare(call, sight))
        if sharing == 1:
            return plain
        batch, _, count, size = plain.meta["val"].shape

        def make(call: Callable[..., fx.Node]) -> fx.Node:
            each = call(aten.unsqueeze.default, plain, 2)
            each = call(aten.expand.default, each, [-1, -1, sharing, -1, -1])
            return call(aten.reshape.default, each, [batch, 1, -1, size])

        return self._once((sight, sharing), make)

    def _compare(self, call: Callable[..., fx.Node], sight: Sight) -> fx.Node:
        """From positions, which places each query sees: bool (batch, 1, n, size)."""
        size = self.options.ring(sight)
        slot = call(aten.arange.default, size, device=self.device)
        query = call(aten.unsqueeze.default, self.positions, 1)
        query = call(aten.unsqueeze.default, query, 3)  # (batch, 1, n, 1)
        itself = call(aten.eq.Tensor, slot, call(aten.remainder.Scalar, query, size))
        seen = held = slot
        if size == self.options.length:
            seen = call(aten.le.Tensor, held, query)
        else:  # the last position that came to each place
            last = call(aten.slice.Tensor, query, 2, -1, _END)
            age = call(aten.remainder.Scalar, call(aten.sub.Tensor, last, slot), size)
            held = call(aten.sub.Tensor, last, age)
            seen = call(aten.le.Tensor, held, query)
            seen = call(aten.logical_and.default, seen, call(aten.ge.Scalar, held, 0))
        # Padding sees itself, or its softmax would be of nothing.
        seen = call(aten.logical_or.default, seen, itself)
        if sight.reach is None or sight.reach >= self.options.length:
            return seen
        if sight.window is not None:
            near = call(aten.gt.Tensor, held, call(aten.sub.Scalar, query, sight.window))
        else:
            inside = call(aten.remainder.Scalar, query, sight.chunk)
            near = call(aten.ge.Tensor, held, call(aten.sub.Tensor, query, inside))
        return call(aten.logical_and.default, seen, near)

    def _in_form(self, sight: Sight, form: str, dtype: torch.dtype) -> fx.Node:
        """What `_visible` gives as the mask that it stands for says it (`Mask.form`)."""
        visible = self._visible(sight)
        if form == "seen":
            return visible
        if form == "hidden":
            return self._once((sight, form), lambda call: call(aten.logical_not.default, visible))
        least = torch.finfo(dtype).min

        def make(call: Callable[..., fx.Node]) -> fx.Node:
            added = call(aten.where.Scalar, visible, 0.0, least)
            return call(aten.to.dtype, added, dtype)

        return self._once((sight, form, dtype), make)


def _seen_by_all(name: str, sights: Iterable[Sight]) -> Sight:
    """What several masks of one attention leave to be seen."""
    sights = list(sights)
    if not sights:
        raise UserError(f"`passes.kv_cache`: {name} sees what comes after a token")
    limited = [sight for sight in sights if sight.reach is not None]
    if len(limited) > 1 and any(sight.window is None for sight in limited):
        raise UserError(f"`passes.kv_cache`: {name} has windows and chunks in one")
    return min(limited, key=lambda sight: sight.window or 0) if limited else Sight()


def _replace(node: fx.Node, value: int) -> None:
    """Put a number in the place of a node."""
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)
    node.graph.erase_node(node)
