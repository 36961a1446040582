"""What a pass is: a frozen dataclass of options that rewrites a program."""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args, get_type_hints

from torch import nn

from graphtune.errors import UserError
from graphtune.program import Program
from graphtune.rewrite import Edit
from graphtune.sites import Site
from graphtune.verify import verify

Numerics: TypeAlias = Literal["exact", "identity_at_init", "rounded", "lossy"]


class Stage(IntEnum):
    """The fixed order of passes. Within a stage, the order in which they were named.

    Until DISTRIBUTE passes make the model, which all its uses share; LOSS and CHECKPOINT only say
    how it is trained (see `Program.apply`).
    """

    NORMALIZE = 0
    QUANTIZE = 1
    ADAPT = 2
    QAT = 3
    DISTRIBUTE = 4
    LOSS = 5
    CHECKPOINT = 6
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
        order: when it runs within its stage; lower first, then as they were named.
        numerics: what it does to the logits. `exact`: the same bits; `identity_at_init`: the
            same bits until training changes its parameters; `rounded`: the same but for how sums
            are rounded; `lossy`: other values. A pass that does this or that, depending on its
            options, makes it a property.
        conflicts: names of passes after which this one cannot be applied.
        takes_images: whether it can be applied to a program that was captured with images.
        site_options: the options that a rule may override at its sites.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    order: ClassVar[int] = 0
    conflicts: ClassVar[frozenset[str]] = frozenset()
    takes_images: ClassVar[bool] = True
    site_options: ClassVar[tuple[str, ...]] = ()

    @property
    def numerics(self) -> Numerics:
        raise TypeError(f"{type(self).__name__} must say its numerics class")

    def check(self, model: nn.Module) -> None:
        """Raise UserError if the pass cannot be applied to a model; before it is captured.

        Args:
            model: what will be captured; perhaps on the meta device, without weights.
        """

    def parts(self) -> Sequence[Pass]:
        """The passes that do the work; several where this one only bundles them."""
        return (self,)

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

    def at(self, overrides: Mapping[str, Any]) -> Self:
        """The pass with the options that a rule overrides (see `graphtune.rules`).

        Raises:
            UserError: there is no such option for a rule, or its value is refused.
        """
        for name, value in overrides.items():
            key = f"`passes.{self.name}.targets`"
            if name not in self.site_options:
                close = difflib.get_close_matches(name, self.site_options, n=1)
                known = f"a rule may have {', '.join(self.site_options) or 'none'}"
                hint = f"did you mean `{close[0]}`?" if close else known
                raise UserError(f"{key}: no option `{name}` in a rule; {hint}")
            hint = get_type_hints(type(self))[name]
            choices = get_args(hint) or (hint,)  # of a union types, of a Literal values
            kinds = {one if isinstance(one, type) else type(one) for one in choices}
            if type(value) not in kinds and not (float in kinds and type(value) is int):
                names = " or ".join(sorted(kind.__name__ for kind in kinds))
                raise UserError(f"{key}: `{name}={value}` must be of type {names}")
        return dataclasses.replace(self, **overrides) if overrides else self

    def __call__(self, program: Program) -> Program:
        """Apply the pass.

        Returns:
            A new program; `program` stays as it is, and tensors not touched are shared.

        Raises:
            UserError: a rule matches nothing, or the pass does not go with one already applied.
            VerificationError: the pass broke the program (a bug in the pass).
        """
        if len(self.parts()) > 1:
            return program.apply(self)
        for row in program.ledger:
            if row.name in self.conflicts:
                raise UserError(f"`passes.{self.name}` cannot follow {row.name!r} on one model")
        if program.takes_images and not self.takes_images:
            raise UserError(
                f"`passes.{self.name}` does not know the inputs of images; leave it out, or "
                "capture the model for text alone"
            )
        start = time.perf_counter()
        edit = Edit(program, by=self.name)
        sites = list(self.rewrite(edit))
        ms = (time.perf_counter() - start) * 1e3
        after = edit.finish(
            sites, badge=self.badge, options=self.options(), numerics=self.numerics, ms=ms
        )
        verify(program, after)
        return after
