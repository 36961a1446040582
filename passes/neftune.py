"""NEFTune: noise on the embedded tokens while a model is fine-tuned.

Jain et al., NEFTune: Noisy Embeddings Improve Instruction Finetuning (arXiv:2310.05914).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from graphtune.errors import UserError
from graphtune.noise import neftune
from graphtune.passes.adapters import last_output
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.rewrite import Edit
from graphtune.sites import Site


@dataclass(frozen=True)
class NEFTune(Pass):
    """Adds uniform noise of at most `alpha / sqrt(seq * width)` to embedded tokens, in training.

    `seq` is the length of the batch's rows, padding included, as in the paper's code and in
    `transformers`, whose noise this is for the same seed. `.eval()` switches it off: the logits
    are those of the program without it, which is why the pass is `exact`.

    Attributes:
        alpha: how strong the noise is, above 0; the paper tries 5, 10 and 15.
    """

    alpha: float = 5.0

    name: ClassVar[str] = "neftune"
    stage: ClassVar[Stage] = Stage.ADAPT
    order: ClassVar[int] = 4  # after adapters: an adapter of the embedding is part of it
    conflicts: ClassVar[frozenset[str]] = frozenset({"neftune"})

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise UserError(f"`passes.neftune.alpha={self.alpha}` must be above 0")

    @property
    def numerics(self) -> Numerics:
        return "exact"

    @property
    def badge(self) -> str:
        return f"neftune α{self.alpha:g}"

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        site = _token_embedding(edit)
        embedded = last_output(site)
        with edit.after(embedded):
            noisy = edit.call(neftune, embedded, float(self.alpha), edit.read_training())
            edit.replace_uses(embedded, noisy)
        return [site]


def _token_embedding(edit: Edit) -> Site:
    """The first embedding that looks up the token ids; one of positions is given others."""
    ids = next(iter(edit.graph.nodes))
    for site in edit.sites("embedding"):
        if ids in _values_behind(site.input):
            return site
    raise UserError("`passes.neftune`: the model embeds no token ids; leave the pass out")


def _values_behind(node: fx.Node) -> set[fx.Node]:
    """The tensors whose values, and not only whose sizes, a node is computed from."""
    seen, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen and isinstance(source.meta["val"], Tensor):
                seen.add(source)
                stack.append(source)
    return seen
