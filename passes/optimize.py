"""The passes that make a step cheaper and change nothing else, together."""

from graphtune.passes.base import Pass
from graphtune.passes.causal_attention import CausalAttention
from graphtune.passes.fuse_adapters import FuseAdapters
from graphtune.passes.grouped_attention import GroupedAttention
from graphtune.passes.shared_mask import SharedMask
from graphtune.program import Program

OPTIMIZATIONS: tuple[Pass, ...] = (
    FuseAdapters(),
    GroupedAttention(),
    SharedMask(),
    CausalAttention(),
)


def optimized(program: Program) -> Program:
    """The program as a training step should run it, over the same tensors.

    Logits and gradients are the same up to rounding. Train this one; evaluate, save and export the
    given one, whose parameters are the same objects. `.train()` and `.eval()` are each one's own.

    Args:
        program: with its weights, on the device that it will train on.
    """
    done = {row.name for row in program.ledger}
    return program.apply(*(one for one in OPTIMIZATIONS if one.name not in done))
