"""What a pass is: a frozen dataclass of options that rewrites a program."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from enum import IntEnum
from typing import ClassVar, Literal

from torch import nn

from graphtune.errors import UserError
from graphtune.program import Program
from graphtune.rewrite import Edit
from graphtune.sites import Site
from graphtune.verify import verify


class Stage(IntEnum):
    """The fixed order of passes. Within a stage, the order in which they were named."""

    NORMALIZE = 0
    QUANTIZE = 1
    ADAPT = 2
    QAT = 3
    LOSS = 4
    CHECKPOINT = 5
    DISTRIBUTE = 6
    COMPILE = 7
    EXPORT = 8


@dataclasses.dataclass(frozen=True)
class Pass:
    """Base of all passes.

    A pass is a frozen dataclass: its fields are its options. It sets the class variables below
    and writes `rewrite`; calling it copies the graph, rewrites the copy, adds a ledger row and
    verifies the result.

    Class variables:
        name: what configs and the ledger call it.
        stage: when it runs.
        numerics: what it does to the logits. `exact`: the same bits; `identity_at_init`: the
            same bits until training changes its parameters; `lossy`: other values.
        conflicts: names of passes after which this one cannot be applied.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    numerics: ClassVar[Literal["exact", "identity_at_init", "lossy"]]
    conflicts: ClassVar[frozenset[str]] = frozenset()

    def check(self, model: nn.Module) -> None:
        """Raise UserError if the pass cannot be applied to a model; before it is captured.

        Args:
            model: what will be captured; perhaps on the meta device, without weights.
        """

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        """Edit the graph and the parameters; return the sites that were changed."""
        raise TypeError(f"{type(self).__name__} must define rewrite(edit)")

    @property
    def badge(self) -> str:
        """What the module tree shows at each site."""
        return self.name

    def options(self) -> dict[str, object]:
        """The options by name, for the ledger and the plan's hash."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __call__(self, program: Program) -> Program:
        """Apply the pass.

        Returns:
            A new program; `program` stays as it is, and tensors not touched are shared.

        Raises:
            UserError: a rule matches nothing, or the pass does not go with one already applied.
            VerificationError: the pass broke the program (a bug in the pass).
        """
        for row in program.ledger:
            if row.name in self.conflicts:
                raise UserError(f"`passes.{self.name}` cannot follow {row.name!r} on one model")
        start = time.perf_counter()
        edit = Edit(program, by=self.name)
        sites = list(self.rewrite(edit))
        ms = (time.perf_counter() - start) * 1e3
        after = edit.finish(
            sites, badge=self.badge, options=self.options(), numerics=self.numerics, ms=ms
        )
        verify(program, after)
        return after
