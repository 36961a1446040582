"""KVCache: keep the keys and values of the tokens so far, so that each new one costs one token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from graphtune.attention_sites import Sight
from graphtune.errors import UserError
from graphtune.fake_quantization import rounds_inputs
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.passes.cached_attention import Rewriting
from graphtune.program import Program
from graphtune.rewrite import Edit
from graphtune.sites import Site, find_sites, module_of, output_head

aten = torch.ops.aten
_END = 2**63 - 1


@dataclass(frozen=True)
class KVCache(Pass):
    """Rewrites the graph into one that reads new tokens only, and earlier ones from a cache.

    Prompts and single tokens go through the same graph: `program(input_ids, position_ids=...)`,
    ids (batch, n) and positions (batch, n), or (n,) for all rows, int64, n from 1 to `prefill`.
    Keys and values of the tokens are written in place to buffers, each at its position, as they
    are before heads are repeated for the queries that share them; what each token sees follows
    from its position. So nothing needs to be cleared between texts: a row that begins again at 0
    sees nothing of the text before.

    In each call a row's positions count up by one, and from call to call they go on. Rows of
    different length are padded on the left, with negative positions that count up to -1; padding
    is written and never seen. On the right, within one call, padding may count on, and the next
    call begin where the row's text ended.

    Layers with a sliding window or chunks get a ring of `window + prefill - 1` positions, so that
    memory is bounded by the window. All parameters are those of the given program, and what
    trains on there is seen here. A program with a cache is for inference: keys and values carry
    no gradient.

    Attributes:
        length: of the longest text, prompt and answer together, at least 8.
        batch: how many rows there are, in every call.
        prefill: the most tokens of a row that one call may bring; None: `length`. Longer prompts
            are given in parts of so many. It is what rings are longer for than their window.
        logits: `all` positions', or only the `last` one's, (batch, 1, vocab).
    """

    length: int = 1024
    batch: int = 1
    prefill: int | None = None
    logits: Literal["all", "last"] = "all"

    name: ClassVar[str] = "kv_cache"
    takes_images: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.EXPORT
    order: ClassVar[int] = 1  # after a merge
    conflicts: ClassVar[frozenset[str]] = frozenset({"kv_cache"})

    def __post_init__(self) -> None:
        self._require(self.length >= 8, "length", "at least 8")
        self._require(self.batch >= 1, "batch", "at least 1")
        part = self.prefill
        self._require(part is None or 1 <= part <= self.length, "prefill", "from 1 to `length`")
        self._require(self.logits in ("all", "last"), "logits", "all or last")

    def _require(self, right: bool, option: str, must: str) -> None:
        if not right:
            raise UserError(f"`passes.kv_cache.{option}={getattr(self, option)}` must be {must}")

    @property
    def numerics(self) -> Numerics:
        return "lossy"  # the same but for rounding, which `__call__` checks

    @property
    def badge(self) -> str:
        return f"cache {self.length}"

    def ring(self, sight: Sight) -> int:
        """How many positions a layer keeps."""
        if sight.reach is None:
            return self.length
        return min(sight.reach + (self.prefill or self.length) - 1, self.length)

    def __call__(self, program: Program) -> Program:
        after = super().__call__(program)
        if program.deferred is None:
            _check_decoding(program, after, self)
        return after

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        positions = getattr(edit.program.config, "max_position_embeddings", None)
        if positions is not None and self.length > positions:
            raise UserError(
                f"`passes.kv_cache.length={self.length}` is more than the model's {positions} "
                f"positions; choose at most {positions}"
            )
        _refuse_recurrence(edit.graph)
        try:
            return self._rewrite(edit)
        except UserError:
            raise
        except Exception as error:  # shapes that do not follow the cache, of whatever kind
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"`passes.kv_cache`: the attention of {edit.info.model_class} is none that is "
                f"known here ({reason}); generate without a cache"
            ) from error

    def _rewrite(self, edit: Edit) -> Iterable[Site]:
        rewriting = Rewriting(edit, self)
        if not rewriting.attentions:
            raise UserError(
                "`passes.kv_cache`: the model has no attention whose keys it could keep"
            )
        for attention in rewriting.attentions:
            rewriting.cache(attention)
        if self.logits == "last":
            _keep_last(edit)
        rewriting.finish()
        return [attention.site for attention in rewriting.attentions]


def _refuse_recurrence(graph: fx.Graph) -> None:
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_function" else ""
        if name.startswith("graphtune.recurrence") or ".conv1d." in name:
            where = module_of(node)[0] or "the model"
            raise UserError(
                f"`passes.kv_cache`: {where} carries a state from token to token "
                f"({name.rpartition('.')[0]}), which is no cache of keys and values; generate "
                "without a cache"
            )


def _keep_last(edit: Edit) -> None:
    """Compute the logits of the last position alone, from before the output head."""
    head = output_head(edit.graph) or ""
    sites = [site for site in find_sites(edit.graph) if site.kind == "linear"]
    hidden = next((site.input for site in sites if site.name == head), None)
    while hidden is not None and module_of(hidden)[0] == head:  # quantized for the head
        hidden = hidden.args[0]
    if hidden is None or any(not module_of(user)[0].startswith(head) for user in hidden.users):
        hidden = edit.graph.output_node().args[0]
    with edit.after(hidden):
        edit.replace_uses(hidden, edit.call(aten.slice.Tensor, hidden, 1, -1, _END))


def reset(program: Program) -> None:
    """Zero a program's caches. Between texts there is no need to; after numbers that are not
    finite there is."""
    for name, buffer in program.named_buffers():
        if name.endswith((".key_cache", ".value_cache")):
            buffer.zero_()


def cache_of(program: Program) -> KVCache | None:
    """The pass that gave a program its cache, or None."""
    rows = (row for row in program.ledger if row.name == KVCache.name)
    return next((KVCache(**row.options) for row in rows), None)


@torch.no_grad()
def _check_decoding(before: Program, after: Program, options: KVCache) -> None:
    """Compare a few tokens, read one by one, with the whole.

    Raises:
        UserError: they differ: something else than attention goes from token to token.
    """
    device = next(before.parameters()).device
    ids = torch.arange(6 * options.batch, device=device).remainder(13).reshape(options.batch, 6)
    positions = torch.arange(6, device=device).repeat(options.batch, 1)
    first = min(3, options.prefill or 3)
    was_training = before.training, after.training
    before.eval(), after.eval()
    try:
        expected = before(ids)[:, -1]
        for start, end in [(0, first), *((i, i + 1) for i in range(first, 6))]:
            found = after(ids[:, start:end], position_ids=positions[:, start:end])
    finally:
        before.train(was_training[0]), after.train(was_training[1])
        reset(after)
    difference = float((found[:, -1] - expected).abs().max() / expected.abs().max())
    limit = 1e-3 if expected.dtype == torch.float32 else 0.25
    if rounds_inputs(before.graph):  # a rounding may take a number to the next integer
        limit = max(limit, 0.1)
    if not difference < limit:
        raise UserError(
            f"`passes.kv_cache`: read token by token, {before.info.model_class} computes something "
            f"else (by {difference:.2g} of the largest logit): more goes from token to token than "
            "keys and values, or it counts positions by itself; generate without a cache"
        )
