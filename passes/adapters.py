"""What adapter passes share: their marks in the graph, and switching between adapters.

An adapter is known by its name. Each node that it inserts carries `custom["adapter"]`, and the
last one at a site `custom["adapter_output"]`, so that a later pass finds where it begins and
ends. How it works at a site is told by its pass, which the ledger remembers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from graphtune.errors import UserError
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.program import Program
from graphtune.rewrite import Edit
from graphtune.rules import Named, match
from graphtune.sites import Site, module_of

if TYPE_CHECKING:
    from graphtune.passes.lora import LoRA

_PARAMETER = re.compile(
    r"(?:^|[._])lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\.(?P<adapter>\w+)"
    r"|\.modules_to_save\.(?P<saved>\w+)\."
)


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, and not to the base model."""
    return _PARAMETER.search(name) is not None


def adapter_of(name: str) -> str | None:
    """The adapter that a parameter belongs to, or None."""
    found = _PARAMETER.search(name)
    return (found["adapter"] or found["saved"]) if found else None


def adapter_names(program: Program) -> list[str]:
    """The adapters of a program, active or not, in the order in which they were applied."""
    names = (adapter_of(name) for name in program.all_parameters())
    present = {name for name in names if name is not None}
    applied = [row.options.get("adapter") for row in program.ledger]
    return [name for name in dict.fromkeys(applied) if name in present]


def adapter_pass(program: Program, adapter: str) -> LoRA:
    """The pass, with its options, that made an adapter."""
    from graphtune.passes.dora import DoRA
    from graphtune.passes.lora import LoRA

    kinds: dict[str, type[LoRA]] = {one.name: one for one in (LoRA, DoRA)}
    row = [row for row in program.ledger if row.options.get("adapter") == adapter][-1]
    return kinds[row.name](**row.options)


def active_adapters(site: Site) -> list[str]:
    """The adapters that act at a site, in their order."""
    return [node.meta["custom"]["adapter"] for node in _outputs(site)]


def last_output(site: Site) -> fx.Node:
    """What the rest of the model reads from a site: its output, or the last adapter's."""
    outputs = _outputs(site)
    return outputs[-1] if outputs else site.output


def mark_output(node: fx.Node) -> fx.Node:
    """Say that the adapter's work at its site ends with this node."""
    node.meta["custom"]["adapter_output"] = True
    return node


def merged_adapters(site: Site) -> list[str]:
    """The adapters that the graph merges into a site's weight, in their order."""
    found: list[str] = []
    node = site.weight
    while "adapter" in node.meta.get("custom", {}):
        if merges := node.meta["custom"].get("merges"):
            found.insert(0, merges)
        node = node.args[0]
    return found


def _outputs(site: Site) -> list[fx.Node]:
    found: list[fx.Node] = []
    node: fx.Node | None = site.output
    while (node := _next_output(node)) is not None:
        found.append(node)
    return found


def _next_output(node: fx.Node) -> fx.Node | None:
    """The first adapter output that is computed from a node, inside one adapter."""
    name = _site_name(node)
    stack = list(node.users)
    while stack:
        user = stack.pop()
        custom = user.meta.get("custom", {})
        if "adapter" in custom and _site_name(user) == name:
            if custom.get("adapter_output"):
                return user
            stack += user.users
    return None


def _site_name(node: fx.Node) -> str:
    return module_of(node)[0]


def strip(edit: Edit) -> dict[Site, list[str]]:
    """Take all adapters out of the graph; their parameters stay.

    Returns:
        The sites that had any, with the adapters that acted there, in their order.
    """
    found: dict[Site, list[str]] = {}
    for site in edit.sites("linear", "embedding", "experts"):
        if adapters := active_adapters(site):
            found[site] = adapters
            last_output(site).replace_all_uses_with(site.output)
        elif adapters := merged_adapters(site):
            base = site.weight
            while "adapter" in base.meta.get("custom", {}):
                base = base.args[0]
            site.weight.replace_all_uses_with(base)
            found[replace(site, weight=base)] = adapters
    for node in edit.graph.find_nodes(op="get_attr"):
        if saved := re.fullmatch(r"(.*)\.modules_to_save\.\w+(\..*)", node.target):
            node.target = saved[1] + saved[2]
    edit.graph.eliminate_dead_code()
    return found


def save_modules(edit: Edit, modules: Sequence[str], adapter: str, *, key: str) -> None:
    """Let copies of whole modules train, `<module>.modules_to_save.<adapter>.<parameter>`.

    Raises:
        UserError: no such module, or one that has no parameters of its own (or quantized ones).
    """
    if not modules:
        return
    for module in match(_modules(edit), modules, key=f"{key}.modules_to_save"):
        own = [n for n in edit.parameters if n.rpartition(".")[0] == module]
        if other := next((n for n in edit.parameters if f"{module}.modules_to_save." in n), None):
            raise UserError(
                f"`{key}.modules_to_save`: {module} is trained by adapter "
                f"{adapter_of(other)!r} already; leave it to one of them"
            )
        for name in own:
            copy = f"{module}.modules_to_save.{adapter}.{name.rpartition('.')[2]}"
            if copy not in edit.parameters:
                (value,) = edit.compute((copy,), lambda weight: (weight.clone(),), name)
                edit.add_parameter(copy, value)
    read_saved(edit, adapter)


def _modules(edit: Edit) -> Iterable[Named]:
    owners = (n.rpartition(".")[0] for n in edit.parameters if not is_adapter_parameter(n))
    return [Named(name) for name in dict.fromkeys(owners)]


def read_saved(edit: Edit, adapter: str) -> None:
    """Let the graph read an adapter's copies of modules instead of the base's."""
    for node in edit.graph.find_nodes(op="get_attr"):
        module, _, leaf = str(node.target).rpartition(".")
        copy = f"{module}.modules_to_save.{adapter}.{leaf}"
        if copy in edit.parameters:
            node.target = copy


@dataclass(frozen=True)
class SetAdapter(Pass):
    """Chooses which of a program's adapters act, in this order; these train, the others do not.

    All adapters stay in the program, so that another `SetAdapter` switches back. What several
    adapters do at one site adds up. An empty list is the base model.

    Attributes:
        adapters: names that were given to `LoRA` and `DoRA`.
    """

    adapters: tuple[str, ...]

    name: ClassVar[str] = "set_adapter"
    stage: ClassVar[Stage] = Stage.ADAPT
    order: ClassVar[int] = 1
    conflicts: ClassVar[frozenset[str]] = frozenset({"qat", "convert"})

    def __post_init__(self) -> None:
        names: str | tuple[str, ...] = self.adapters
        object.__setattr__(self, "adapters", (names,) if isinstance(names, str) else tuple(names))

    @property
    def numerics(self) -> Numerics:
        return "lossy"

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        known = adapter_names(edit.program)
        for name in self.adapters:
            if name not in known:
                there = ", ".join(known) or "none"
                raise UserError(
                    f"`passes.set_adapter.adapters`: no adapter {name!r}; there are: {there}"
                )
        strip(edit)
        sites: dict[str, Site] = {}
        for name in self.adapters:
            sites |= {site.name: site for site in insert(edit, name)}
        for parameter in list(edit.parameters):
            if (adapter := adapter_of(parameter)) is not None:
                edit.set_trainable([parameter], adapter in self.adapters)
        return sites.values()


def insert(edit: Edit, adapter: str) -> list[Site]:
    """Let the graph use an adapter whose parameters are there; returns its sites."""
    one = adapter_pass(edit.program, adapter)
    sites = one.adapted_sites(edit.graph)
    for site, own in sites:
        own.insert(edit, site)
    read_saved(edit, adapter)
    return [site for site, _ in sites]
