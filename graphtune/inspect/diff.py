"""How two programs of one capture differ."""

from __future__ import annotations

import difflib
import re
from collections import Counter

from torch import fx

from graphtune.program import Program
from graphtune.sites import module_of


def diff(before: Program, after: Program) -> str:
    """Operators that came and went, and the changed lines of one representative layer."""
    counts = Counter(_operators(after))
    counts.subtract(_operators(before))
    changed = [f"{count:+5d}  {name}" for name, count in sorted(counts.items()) if count]
    layer = _first_layer(after)
    lines = difflib.unified_diff(
        _code(before, layer), _code(after, layer), "before", f"after ({layer})", lineterm="", n=1
    )
    return "\n".join(["operators", *(changed or ["  none changed"]), "", *lines])


def _operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def _first_layer(program: Program) -> str:
    """Qualified name of the first numbered layer that a pass wrote in, or of the first one."""
    nodes = sorted(
        program.graph.nodes, key=lambda node: "graphtune" not in node.meta.get("custom", {})
    )
    for node in nodes:
        if match := re.match(r"(.*?\.\d+)(\.|$)", module_of(node)[0]):
            return match[1]
    return ""


def _code(program: Program, layer: str) -> list[str]:
    def line(node: fx.Node) -> str:
        return f"{node.name} = {node.target}{tuple(node.args)}"

    return [
        line(node)
        for node in program.graph.nodes
        if node.op != "output" and f"{module_of(node)[0]}.".startswith(f"{layer}.")
    ]
