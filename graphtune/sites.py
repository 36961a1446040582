"""Find the places in a graph that a pass can act on, and the rules that choose among them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphtune.errors import UserError

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """A place in the graph that a pass can act on.

    Attributes:
        name: qualified name of the module that made the node, as in the checkpoint.
        kind: "linear", "embedding" or "attention".
        node: the call; its arguments are read through the properties below.
        transposed: the weight is (in, out), as in GPT-2's `Conv1D`, instead of (out, in).
    """

    name: str
    kind: str
    node: fx.Node
    transposed: bool = False

    @property
    def input(self) -> fx.Node:
        """What the linear or the embedding is applied to."""
        return (
            self.node.args[1] if self.transposed or self.kind == "embedding" else self.node.args[0]
        )

    @property
    def weight(self) -> fx.Node:
        """The node that gives the weight of a linear or an embedding."""
        if self.transposed:
            return self.node.args[2]
        return self.node.args[0] if self.kind == "embedding" else self.node.args[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of a linear, (rows, width) of an embedding."""
        rows, columns = self.weight.meta["val"].shape
        return (columns, rows) if self.transposed else (rows, columns)


def module_of(node: fx.Node) -> tuple[str, str]:
    """Qualified name and class path of the module that made a node; ("", "") for none."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1] if stack else ("", "")


def find_sites(graph: fx.Graph) -> Iterator[Site]:
    """All sites of a graph, in its order. What passes inserted is not a site."""
    for node in graph.nodes:
        if "graphtune" in node.meta.get("custom", {}):
            continue
        name = module_of(node)[0]
        if node.target is aten.linear.default:
            yield Site(name, "linear", node)
        elif node.target is aten.addmm.default:
            yield Site(name, "linear", node, transposed=True)
        elif node.target is aten.embedding.default:
            yield Site(name, "embedding", node)
        elif node.target is aten.scaled_dot_product_attention.default:
            yield Site(name, "attention", node)


def output_head(graph: fx.Graph) -> str | None:
    """Name of the linear that makes the logits (`lm_head`), or None."""
    node = graph.output_node().args[0]
    while isinstance(node, fx.Node) and node.all_input_nodes:
        if node.target is aten.linear.default and "graphtune" not in node.meta.get("custom", {}):
            return module_of(node)[0]
        node = node.all_input_nodes[0]
    return None


def match(
    names: Iterable[str], targets: Sequence[str], *, head: str | None, key: str = "targets"
) -> list[str]:
    """The names that a rule's targets choose, in the order of `names`.

    Args:
        names: qualified names of all the sites that the pass could act on.
        targets: each a glob on the qualified name (`*.layers.3.*.q_proj`), a last name alone
            (`q_proj`), a regular expression behind `re:` that must match the whole name, or
            `all-linear`: every linear but the output head.
        head: name of the output head.
        key: the config key that errors name.

    Raises:
        UserError: a target matches no name; the message shows the nearest.
    """
    known = list(dict.fromkeys(names))
    chosen: set[str] = set()
    for target in targets:
        matched = [name for name in known if _matches(name, target, head, key)]
        if not matched:
            nearest = ", ".join(_nearest(target, known)) or "none, the model has no such sites"
            raise UserError(
                f"`{key}`: {target!r} matches no site of this model; nearest: {nearest}"
            )
        chosen.update(matched)
    return [name for name in known if name in chosen]


def _matches(name: str, target: str, head: str | None, key: str) -> bool:
    if target == "all-linear":
        return name != head
    if target.startswith("re:"):
        try:
            return re.fullmatch(target[3:], name) is not None
        except re.error as error:
            raise UserError(f"`{key}`: {target!r} is no regular expression: {error}") from None
    return fnmatch.fnmatchcase(name, target) or name.endswith("." + target)


def _nearest(target: str, names: Sequence[str]) -> list[str]:
    """Names people may have meant: last names first, since a typo is mostly there."""
    last = re.split(r"[.*\\]", target)[-1] or target
    leaves = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    found = difflib.get_close_matches(last, leaves, n=3, cutoff=0.5)
    return found or difflib.get_close_matches(target, names, n=3, cutoff=0.3) or leaves[:8]
