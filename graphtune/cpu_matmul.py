"""Matrix products of compiled float32 programs by oneDNN, on CPUs where torch's library is slow.

For float32 torch calls MKL, which gives an AMD processor half as wide instructions as it has: its
products take twice as long as oneDNN's, which torch keeps for other dtypes. Nothing else changes
hands: eager mode, and CPUs that MKL knows, compute as ever.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from graphtune.torch_private import linear_by_onednn, with_post_grad_pass

aten = torch.ops.aten


@cache
def prefers_onednn() -> bool:
    """Whether this CPU is one of those: an AMD with AVX-512.

    What is known of the hardware, and not measured, so that the answer never changes.
    """
    known = torch.cpu.get_capabilities()
    is_amd = str(known.get("cpu_name", "")).startswith("AMD")
    mkl = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return bool(is_amd and known.get("avx512_f", False) and mkl)


def matmul_options() -> dict[str, Any]:
    """What inductor is told on this CPU; nothing where torch's own choice is good."""
    return with_post_grad_pass(use_onednn, "graphtune.cpu_matmul 1") if prefers_onednn() else {}


def use_onednn(graph: fx.Graph) -> None:
    """Let oneDNN compute the float32 products of a graph of aten operators that lie on a CPU."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            continue
        if value.dtype != torch.float32:
            continue
        if node.target is aten.mm.default:
            node.target = mm
        elif node.target is aten.addmm.default and _adds_a_bias(node):
            bias, a, b = node.args
            node.target, node.args = mm, (a, b, bias)


def _adds_a_bias(node: fx.Node) -> bool:
    """And not a matrix, such as the sum of gradients so far, which torch adds to in place."""
    return node.args[0].meta["val"].dim() == 1 and not node.kwargs


def _shape(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


torch.library.define("graphtune::onednn_mm", "(Tensor a, Tensor b, Tensor? bias=None) -> Tensor")
torch.library.impl("graphtune::onednn_mm", "CPU", linear_by_onednn)
torch.library.register_fake("graphtune::onednn_mm", _shape)
mm = torch.ops.graphtune.onednn_mm.default
"""(m, k) times (k, n), float32 with any strides, plus a bias (n,)."""
