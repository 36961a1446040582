"""TensorParallel: every rank does its part of each matrix product, on the same tokens.

Shoeybi et al., Megatron-LM (arXiv:1909.08053); sequence parallel: Korthikanti et al., Reducing
Activation Recomputation in Large Transformer Models (arXiv:2205.05198).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from graphtune.distributed import Distribution, current_mesh, group_name
from graphtune.errors import UserError
from graphtune.passes.adapters import adapter_of
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.passes.split_weights import WeightSlices
from graphtune.passes.units import describe, sum_replicated
from graphtune.rewrite import Edit
from graphtune.rules import Target, match
from graphtune.sites import Site, output_head
from graphtune.split_rules import rule_of
from graphtune.splitting import Spread
from graphtune.tensor_plan import Block, find_blocks

KEY = "passes.tensor_parallel"


@dataclass(frozen=True)
class TensorParallel(Pass):
    """Divides linears, attention heads and the vocabulary over the axis `tp` of the mesh.

    Of the linears before an attention or within an MLP each rank has some outputs (columns of the
    product: q, k, v, gate, up), of the linear that ends it the inputs that go with them (rows: o,
    down); its results are added up over the ranks. That is two all-reduces for a layer in the
    forward pass, and two in the backward pass. Which linears these are is read off the graph: a
    linear ends a block if all it is computed from are linears that lead nowhere else. Others stay
    whole, on every rank.

    Adapters are divided with their linear, and so are quantized weights, on borders of blocks.
    Every rank must be given the same tokens, and draw the same random numbers.

    Attributes:
        mesh: the run's mesh; None: that of `graphtune.distributed.make_mesh`.
        targets: rules, see `graphtune.rules.match`; a block is divided if all its linears are
            chosen. By default all.
        sequence_parallel: between the blocks each rank has some of the tokens: all-reduces become
            a reduce-scatter and an all-gather, and what is kept for the backward pass is divided.
        vocab_parallel: divide the embedding of tokens and the output head by tokens of the
            vocabulary.
        gather_logits: let the program return all logits. Without it each rank has those of its
            tokens of the vocabulary, for `graphtune.losses.VocabParallelCrossEntropy`.
    """

    mesh: DeviceMesh | None = None
    targets: tuple[Target, ...] = ("*",)
    sequence_parallel: bool = False
    vocab_parallel: bool = True
    gather_logits: bool = True

    name: ClassVar[str] = "tensor_parallel"
    takes_images: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.DISTRIBUTE
    order: ClassVar[int] = -1
    conflicts: ClassVar[frozenset[str]] = frozenset(
        {"tensor_parallel", "context_parallel", "fsdp", "data_parallel"}
    )

    def __post_init__(self) -> None:
        given = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", given)
        if not (self.vocab_parallel or self.gather_logits):
            raise UserError(
                f"`{KEY}.gather_logits=false` needs `{KEY}.vocab_parallel=true`: the logits are "
                "not divided"
            )

    @property
    def numerics(self) -> Numerics:
        return "lossy"  # sums are taken in another order

    @property
    def badge(self) -> str:
        return "tp sequence" if self.sequence_parallel else "tp"

    def options(self) -> dict[str, object]:
        """The mesh as the sizes of its axes."""
        return {**super().options(), "mesh": describe(self._mesh())}

    def _mesh(self) -> DeviceMesh:
        return self.mesh or current_mesh(KEY)

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        mesh = self._mesh()
        if mesh["tp"].size() == 1:
            raise UserError(f"`{KEY}` has one rank to divide over, tp=1; leave the pass out")
        blocks = self._chosen(edit)
        spread = Spread(
            edit,
            rule_of,
            KEY,
            "tp",
            mesh["tp"].size(),
            group_name(mesh, "tp"),
            sequence=self.sequence_parallel,
        )
        slices = WeightSlices(edit, spread, mesh.get_local_rank("tp"))
        sites = []
        for block in blocks:
            for site in block.columns:
                slices.column(site)
            slices.row(block.row)
            sites += [*block.columns, block.row]
        if self.vocab_parallel:
            sites += slices.vocabulary(*self._vocabulary(edit))
        spread.run(slices.layouts, slices.special, gather=self.gather_logits)
        sum_replicated(edit, spread.entered_weights(), mesh, ("tp",), None)
        before = edit.distribution.parts if edit.distribution else {}
        edit.distribution = Distribution(mesh, {**before, **slices.parts})
        return sites

    def _chosen(self, edit: Edit) -> list[Block]:
        blocks = find_blocks(edit)
        linears = [site for block in blocks for site in (*block.columns, block.row)]
        if not linears:
            raise UserError(
                f"`{KEY}`: the model has no attention or MLP whose linears lead only to its last "
                "one; leave the pass out"
            )
        chosen = match(linears, self.targets, key=f"{KEY}.targets")
        return [
            block
            for block in blocks
            if all(site.name in chosen for site in (*block.columns, block.row))
        ]

    @staticmethod
    def _vocabulary(edit: Edit) -> tuple[list[Site], list[Site]]:
        """The embeddings of token ids, and the output head, that are divided.

        Adapters of an embedding need all of it; it then stays whole, and a tied head too.
        """
        places = edit.sites("linear", "embedding")
        head = output_head(edit.graph)
        heads = [site for site in places if site.kind == "linear" and site.name == head]
        ids = edit.graph.find_nodes(op="placeholder")[0]
        embeddings = [s for s in places if s.kind == "embedding" and _reads(s.input, ids)]
        whole = [s for s in embeddings if _has_adapter(edit, s)]
        tied = {id(edit.parameters.get(site.parameter)) for site in whole}
        return (
            [site for site in embeddings if site not in whole],
            [s for s in heads if id(edit.parameters.get(s.parameter)) not in tied or not whole],
        )


def _reads(node: fx.Node, ids: fx.Node) -> bool:
    """Whether a node is the token ids, perhaps in another shape."""
    while node.op == "call_function" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node is ids


def _has_adapter(edit: Edit, site: Site) -> bool:
    prefix = f"{site.name}."
    names: Sequence[str] = [name for name in edit.parameters if name.startswith(prefix)]
    return any(adapter_of(name) is not None and ".modules_to_save." not in name for name in names)
