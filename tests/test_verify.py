"""The verifier catches passes that are wrong, and names what is."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import graphtune as gt
from graphtune.passes import LoRA, Pass, Stage
from graphtune.verify import VerificationError
from tests.oracles.models import tiny_model

aten = torch.ops.aten


@dataclass(frozen=True)
class _Wrong(Pass):
    name: ClassVar[str] = "wrong"
    stage: ClassVar[Stage] = Stage.ADAPT
    numerics: ClassVar[str] = "exact"


class _ChangesLogits(_Wrong):
    def rewrite(self, edit):
        site = edit.sites("linear")[0]
        with edit.after(site.node):
            edit.replace_uses(site.node, edit.call(aten.mul.Tensor, site.node, 1.001))
        return [site]


class _LiesAboutShapes(_Wrong):
    def rewrite(self, edit):
        site = edit.sites("linear")[0]
        with edit.after(site.node):
            new = edit.call(aten.mul.Tensor, site.node, 1.0)
        new.meta["val"] = edit.sites("linear")[1].node.meta["val"]
        edit.replace_uses(site.node, new)
        return [site]


class _LeavesShapesOut(_Wrong):
    def rewrite(self, edit):
        site = edit.sites("linear")[0]
        with edit.graph.inserting_after(site.node):
            new = edit.graph.call_function(aten.mul.Tensor, (site.node, 1.0))
        edit.replace_uses(site.node, new)
        return [site]


class _CutsGradients(_Wrong):
    def rewrite(self, edit):
        site = edit.sites("linear")[0]
        with edit.after(site.node):
            edit.replace_uses(site.node, edit.call(aten.detach.default, site.node))
        return [site]


class _AddsUnusedParameter(_Wrong):
    def rewrite(self, edit):
        edit.add_parameter("spare.weight", torch.zeros(3))
        return []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            _ChangesLogits,
            r"wrong: claims the same output as before \(exact\), yet they differ by \d",
        ),
        (_LiesAboutShapes, r"wrong: node mul.*q_proj carries .* and computes"),
        (_LeavesShapesOut, "wrong: node mul.* carries no shape"),
        (_CutsGradients, "wrong: .*q_proj.weight is trainable and gets no gradient"),
        (_AddsUnusedParameter, "wrong: spare.weight is trainable and gets no gradient"),
    ],
)
def test_wrong_pass_is_caught(wrong, message):
    program = gt.capture(tiny_model("llama"))
    with pytest.raises(VerificationError, match=message):
        program.apply(wrong())


def test_ledger_says_what_is_there():
    base = gt.capture(tiny_model("llama"))
    tuned = base.apply(LoRA(rank=3, targets=["q_proj"]))
    (row,) = tuned.ledger
    added = {n: p for n, p in tuned.named_parameters() if n not in base.state_dict()}
    assert row.sites == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(2))
    assert row.nodes == len(tuned.graph.nodes) - len(base.graph.nodes) > 0
    assert row.parameters == row.trainable == sum(p.numel() for p in added.values())
    assert row.bytes == 4 * row.parameters
    assert row.options["rank"] == 3


class _Alone(_Wrong):
    numerics = "lossy"
    conflicts = frozenset({"lora"})

    def rewrite(self, edit):
        return []


def test_a_pass_that_conflicts_with_one_already_applied_is_refused():
    base = gt.capture(tiny_model("llama"))
    with pytest.raises(gt.UserError, match="passes.wrong.*cannot follow 'lora'"):
        base.apply(LoRA(rank=2)).apply(_Alone())
    base.apply(_Alone())


class _Rounds(_Wrong):
    numerics: ClassVar[str] = "rounded"

    def rewrite(self, edit):
        site = edit.sites("linear")[0]
        with edit.after(site.node):
            third = edit.call(aten.div.Tensor, site.node, 3.0)
            edit.replace_uses(site.node, edit.call(aten.mul.Tensor, third, 3.0))
        return [site]


class _RoundsFarTooMuch(_Wrong):
    numerics: ClassVar[str] = "rounded"

    def rewrite(self, edit):
        head = edit.sites("linear")[-1]
        with edit.after(head.node):
            edit.replace_uses(head.node, edit.call(aten.mul.Tensor, head.node, 1.001))
        return [head]


def test_rounding_is_allowed_to_those_who_say_so_and_nothing_more():
    program = gt.capture(tiny_model("llama"))
    assert _Rounds()(program).ledger[-1].numerics == "rounded"
    with pytest.raises(VerificationError, match="claims the same output"):
        _RoundsFarTooMuch()(program)
