"""Text views of Programs, and what a step of one takes."""

from graphtune.inspect.diff import diff
from graphtune.inspect.ledger import ledger
from graphtune.inspect.memory import MemoryEstimate, estimate
from graphtune.inspect.tree import tree

__all__ = ["MemoryEstimate", "diff", "estimate", "ledger", "tree"]
