"""The module tree of a program, identical layers folded, with badges for what passes did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from graphtune.program import Program
from graphtune.rewrite import written_by
from graphtune.sites import module_of


@dataclass
class _Module:
    name: str
    kind: str = ""
    shape: str = ""
    badges: list[str] = field(default_factory=list)
    children: dict[str, _Module] = field(default_factory=dict)

    def signature(self) -> tuple:
        """What two modules must share to be shown as one; names of numbered layers aside."""
        children = tuple((c.name, c.signature()) for c in self.children.values())
        return self.kind, self.shape, tuple(self.badges), children

    def line(self) -> str:
        badges = "".join(f" [{badge}]" for badge in self.badges)
        return " ".join(part for part in (self.kind, self.shape) if part) + badges


def tree(program: Program) -> str:
    """The module tree as text, one line for each distinct module.

    Layers that have the same modules, shapes and passes are folded into one entry (`0-29 x30`);
    a layer that differs is listed apart.
    """
    root = _build(program)
    lines = [f"{program.info.model_class} {root.line()}".rstrip()]
    lines += _render(root, "")
    return "\n".join(lines)


def _build(program: Program) -> _Module:
    root = _Module("")
    badges = {row.name: row.badge for row in program.ledger}
    parameters = program.all_parameters()
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        for name, kind in stack.values():
            if name:
                module = _descend(root, name)
                module.kind = kind.rsplit(".", 1)[-1]
                if f"{name}.weight" in parameters:
                    module.shape = _shape(parameters[f"{name}.weight"].shape, module.kind)
        name = module_of(node)[0]
        badge = badges.get(written_by(node) or "")
        module = _descend(root, name) if name else root
        if node.meta.get("custom", {}).get("parameter") == f"{name}.weight":  # a quantized one
            module.shape = _shape(node.meta["val"].shape, module.kind)
        if badge and badge not in module.badges:
            module.badges.append(badge)
    return root


def _shape(shape: tuple[int, ...], kind: str) -> str:
    if len(shape) != 2:
        return "x".join(map(str, shape))
    rows, columns = shape if kind in ("Embedding", "Conv1D") else reversed(shape)
    return f"{rows}→{columns}" if kind != "Embedding" else f"{rows}x{columns}"


def _descend(root: _Module, name: str) -> _Module:
    module = root
    for part in name.split("."):
        module = module.children.setdefault(part, _Module(part))
    return module


def _render(module: _Module, indent: str) -> Iterator[str]:
    groups = list(_folded(module))
    for index, (label, child) in enumerate(groups):
        last = index == len(groups) - 1
        yield f"{indent}{'└─ ' if last else '├─ '}{label} {child.line()}".rstrip()
        yield from _render(child, indent + ("   " if last else "│  "))


def _folded(module: _Module) -> Iterator[tuple[str, _Module]]:
    """Children with their labels; runs of equal numbered layers as one."""
    run: list[_Module] = []
    for child in module.children.values():
        if run and not (
            child.name.isdigit()
            and run[-1].name.isdigit()
            and child.signature() == run[-1].signature()
        ):
            yield _label(run), run[0]
            run = []
        run.append(child)
    if run:
        yield _label(run), run[0]


def _label(run: list[_Module]) -> str:
    if len(run) == 1:
        return run[0].name
    return f"{run[0].name}-{run[-1].name} x{len(run)}"
