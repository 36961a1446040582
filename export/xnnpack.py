"""What XNNPACK, ExecuTorch's CPU backend, needs of a graph, and what it took of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager

_MATMULS = {f"aten.{name}.default" for name in ("linear", "addmm", "mm", "bmm", "matmul")}
# Each as a model calls it, and as a captured graph does.
_ATEN, _FUNCTIONAL = torch.ops.aten, nn.functional
_SDPA = (_FUNCTIONAL.scaled_dot_product_attention, _ATEN.scaled_dot_product_attention.default)
_EMBEDDING = (_FUNCTIONAL.embedding, _ATEN.embedding.default)
_GELU = (_FUNCTIONAL.gelu, _ATEN.gelu.default)


class XnnpackForms(TorchFunctionMode):
    """Traces three operators in a form that XNNPACK and ExecuTorch run, and run rightly.

    Attention becomes two `bmm` around a softmax, over an additive mask that layers share:
    PyTorch's own decomposition asks in each layer whether a row of the mask is empty, with
    elementwise operators on (heads, seq, seq) that XNNPACK has not. A causal row never is.

    GELU in its tanh form is written out: ExecuTorch 1.4 lowers it as the exact GELU
    (github.com/pytorch/executorch/pull/22851), which is off by up to 5e-4.

    An embedding loses its padding index, which only gradients ask for: with it, ExecuTorch does
    not know the lookup of a quantized table.
    """

    def __init__(self) -> None:
        super().__init__()
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}  # keeps the mask, and so its id

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SDPA:
            return self._attention(*args, **kwargs)
        if func in _GELU and kwargs.get("approximate") == "tanh":
            return _gelu_tanh(*args)
        if func in _EMBEDDING:
            return func(*args[:2])
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # a device does not drop
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        _, heads, length, width = query.shape
        if key.shape[1] != heads:
            key = key.repeat_interleave(heads // key.shape[1], dim=1)
            value = value.repeat_interleave(heads // value.shape[1], dim=1)
        query = query * (width**-0.5 if scale is None else scale)
        scores = torch.bmm(
            query.reshape(heads, -1, width), key.reshape(heads, -1, width).transpose(1, 2)
        )
        if is_causal:
            attn_mask = torch.ones(1, 1, length, key.shape[2], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = scores + self._bias(attn_mask)
        weights = torch.softmax(scores, dim=-1)
        return torch.bmm(weights, value.reshape(heads, -1, value.shape[3])).unsqueeze(0)

    def _bias(self, mask: Tensor) -> Tensor:
        if id(mask) not in self._biases:
            bias = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
            self._biases[id(mask)] = (mask, bias.squeeze(0))
        return self._biases[id(mask)][1]


def _gelu_tanh(x: Tensor) -> Tensor:
    """Hendrycks and Gimpel, Gaussian Error Linear Units (arXiv:1606.08415), section 2."""
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1 + torch.tanh(inner))


def undelegated_matmuls(edge: EdgeProgramManager) -> list[str]:
    """Names of the matrix products with a constant operand that no delegate runs."""
    program = edge.exported_program()
    signature = program.graph_signature
    constants = {
        *signature.inputs_to_parameters,
        *signature.inputs_to_buffers,
        *signature.inputs_to_lifted_tensor_constants,
    }

    def is_constant(node: fx.Node) -> bool:  # a weight, or a weight transposed or dequantized
        inputs = node.all_input_nodes
        return node.name in constants or (bool(inputs) and all(map(is_constant, inputs)))

    return [
        node.name
        for node in program.graph.nodes
        if getattr(node.target, "__name__", "") in _MATMULS
        and any(map(is_constant, node.all_input_nodes))
    ]


def integer_weights(edge: EdgeProgramManager) -> tuple[list[str], list[str]]:
    """Names of the integer weights that no delegate reads: of embeddings, and of all else."""
    embeddings: list[str] = []
    others: list[str] = []
    for node in edge.exported_program().graph.nodes:
        if "dequantize_affine" in getattr(node.target, "__name__", ""):
            users = [getattr(user.target, "__name__", "") for user in node.users]
            kind = embeddings if all("embedding" in user for user in users) else others
            kind.append(node.args[0].name)
    return embeddings, others


def coverage(edge: EdgeProgramManager) -> tuple[int, dict[str, tuple[int, int]]]:
    from executorch.devtools.backend_debug import get_delegation_info

    info = get_delegation_info(edge.exported_program().graph_module)
    coverage = {
        name: (count.delegated, count.non_delegated)
        for name, count in sorted(info.delegation_by_operator.items())
        if name != "getitem"  # the outputs of delegates, not work
    }
    return info.num_delegated_subgraphs, coverage
