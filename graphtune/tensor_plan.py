"""Which linears of a graph can be divided over ranks together, read off the graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphtune.rewrite import Edit
from graphtune.sites import Site, module_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """Linears that are divided together.

    Attributes:
        columns: those of which each rank has some outputs: q, k and v, or gate and up.
        row: the one that ends the block, of which each rank has the inputs that go with them.
    """

    columns: tuple[Site, ...]
    row: Site


def find_blocks(edit: Edit) -> list[Block]:
    """The blocks of a graph, in its order.

    A linear ends a block if everything that it is computed from are linears, constants and the
    mask or positions, and if those linears lead to nothing but it. A residual stream leads to
    more, so that nothing that reads it ends a block.
    """
    linears = edit.sites("linear")
    by_name = {site.name: site for site in linears}
    barriers = {site.node: site.name for site in edit.sites("embedding", "experts")}
    blocks = []
    for row in linears:
        before = _linears_behind(row, by_name, barriers)
        if before and all(_leads_to(by_name[one], row, by_name) for one in before):
            columns = tuple(site for site in linears if site.name in before)
            blocks.append(Block(columns, row))
    return blocks


def _linears_behind(
    row: Site, by_name: dict[str, Site], barriers: dict[fx.Node, str]
) -> set[str] | None:
    """Names of the linears that the input of one is computed from; None: from other things too."""
    found: set[str] = set()
    seen: set[fx.Node] = set()
    stack = [row.input]
    while stack:
        node = stack.pop()
        if node in seen or not isinstance(node.meta.get("val"), Tensor | list | tuple):
            continue  # a size says nothing of where values are from
        seen.add(node)
        owner = module_of(node)[0]
        if node in barriers or (node.op == "placeholder" and node.name == "input_ids"):
            return None
        if node.op == "call_function" and owner in by_name and owner != row.name:
            found.add(owner)
        else:
            stack += node.all_input_nodes
    return found - {row.name}


def _leads_to(site: Site, row: Site, by_name: dict[str, Site]) -> bool:
    """Whether nothing but the row reads what a linear gives."""
    seen: set[fx.Node] = set()
    stack = [site.node]
    while stack:
        node = stack.pop()
        if node in seen or not isinstance(node.meta.get("val", ()), Tensor | list | tuple):
            continue
        seen.add(node)
        owner = module_of(node)[0]
        if node.op == "output":
            return False
        if owner in by_name and owner != site.name:
            if owner != row.name:
                return False
        else:
            stack += node.users
    return True
