"""Convert: make integers of what QAT trained."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from graphtune.errors import UserError
from graphtune.fake_quantization import (
    bounds,
    fake_quantize_tensor,
    fake_quantize_tokens,
    fake_quantize_weight,
    static_qparams,
)
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.passes.qat import ENABLED
from graphtune.rewrite import Edit, constants_of, evaluate
from graphtune.sites import Site, module_of
from graphtune.torchao_operators import torchao

QDATA, SCALE, ZERO_POINT = "qdata", "scale", "zero_point"  # suffixes of a weight's buffers


@dataclass(frozen=True)
class Convert(Pass):
    """Keeps weights as integers and quantizes inputs to integers, wherever `QAT` only computed as
    if; the logits are the same, bit for bit.

    A weight `w` becomes the buffers `w_qdata` int8, of its shape, `w_scale` and `w_zero_point`,
    which `torchao.dequantize_affine` reads; an input goes through `torchao.quantize_affine`: what
    the XNNPACK backend of ExecuTorch runs in integers. Adapters that QAT merged are merged,
    others stay as they are. Nothing of the result trains.

    Attributes:
        qparams: how scales of weights are chosen: `affine`, as QAT did; or `hqq`, which lowers the
            rounding's error instead (torchao's; Badri and Shaji, Half-Quadratic Quantization of
            Large Machine Learning Models, 2023): for models that were not trained for it.
    """

    qparams: Literal["affine", "hqq"] = "affine"

    name: ClassVar[str] = "convert"
    stage: ClassVar[Stage] = Stage.EXPORT
    order: ClassVar[int] = 1  # after a merge
    conflicts: ClassVar[frozenset[str]] = frozenset({"convert"})

    def __post_init__(self) -> None:
        if self.qparams not in ("affine", "hqq"):
            raise UserError(f"`passes.convert.qparams={self.qparams}` must be affine or hqq")

    @property
    def numerics(self) -> Numerics:
        return "exact" if self.qparams == "affine" else "lossy"

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        if "qat" not in [row.name for row in edit.program.ledger]:
            raise UserError("`passes.convert`: the program has no fake quantization; apply QAT")
        if ENABLED in edit.buffers and not edit.tensor(ENABLED):
            raise UserError(
                "`passes.convert`: fake quantization has not begun (`passes.qat.enabled_from_step`)"
                "; train beyond that step, or apply QAT without it"
            )
        written: dict[tuple[Any, ...], str] = {}
        replaced: set[str] = set()
        for node in list(edit.graph.nodes):
            if node.target is fake_quantize_weight:
                replaced.update(constants_of(node) or ())
                self._weight(edit, node, written)
            elif node.target is fake_quantize_tokens:
                _tokens(edit, node)
            elif node.target is fake_quantize_tensor:
                replaced.add(node.args[1].target)
                _tensor(edit, node)
        edit.graph.eliminate_dead_code()
        used = {node.target for node in edit.graph.find_nodes(op="get_attr")}
        for name in replaced - used:
            edit.remove(name)
        edit.set_trainable(edit.parameters, False)
        names = {
            module_of(node)[0]
            for node in edit.graph.nodes
            if node.meta.get("custom", {}).get("graphtune") == self.name
        }
        return [s for s in edit.sites("linear", "embedding", "experts") if s.name in names]

    def _weight(self, edit: Edit, node: fx.Node, written: dict[tuple[Any, ...], str]) -> None:
        source, axis, group, bits, bfloat16_scale = node.args[:5]
        name, like = node.meta["custom"]["parameter"], node.meta["val"]
        block = [1] * like.dim()
        block[axis] = group
        # Tied weights that are quantized alike are kept once.
        key = (*(id(edit.tensor(n)) for n in constants_of(source) or ()), *node.args[1:5])
        names = tuple(f"{written.setdefault(key, name)}_{s}" for s in (QDATA, SCALE, ZERO_POINT))
        if names[0] not in edit.buffers:
            inputs = constants_of(source) or ()

            def quantize(*tensors: Tensor) -> tuple[Tensor, ...]:
                weight = evaluate(source, dict(zip(inputs, tensors, strict=True)))
                return self._quantize(weight, block, bits, bfloat16_scale)

            for one, value in zip(names, edit.compute(names, quantize, *inputs), strict=True):
                edit.add_buffer(one, value)
        with edit.after(node, parameter=name):
            data, scale, zero_point = map(edit.read, names)
            op = torchao().dequantize_affine.default
            value = edit.call(
                op, data, block, scale, zero_point, torch.int8, *bounds(bits), like.dtype
            )
            node.replace_all_uses_with(value)

    def _quantize(
        self, weight: Tensor, block: list[int], bits: int, bfloat16_scale: bool
    ) -> tuple[Tensor, ...]:
        """Integers int8 of the weight's shape; scale, in its dtype, and zero point int8 of each
        block."""
        dtype = torch.bfloat16 if bfloat16_scale else weight.dtype
        if self.qparams == "hqq":
            data, scale = _hqq(weight, block, bits)
            zero_point = torch.zeros_like(scale, dtype=torch.int8)
            return data, scale.to(dtype).to(weight.dtype), zero_point
        ops, limits = torchao(), bounds(bits)
        scale, zero_point = ops.choose_qparams_affine(
            weight, "SYMMETRIC", block, torch.int8, *limits, None, dtype, torch.int8, True
        )
        data = ops.quantize_affine(weight, block, scale, zero_point, torch.int8, *limits)
        return data, scale.to(weight.dtype), zero_point


def _hqq(weight: Tensor, block: list[int], bits: int) -> tuple[Tensor, ...]:
    from torchao.quantization.quant_primitives import (
        _choose_qparams_and_quantize_scale_only_hqq as choose,
    )

    axis = next((i - len(block) for i, size in enumerate(block) if size > 1), -1)
    rows = weight.transpose(axis, -1)
    data, scale = choose(rows.reshape(-1, rows.shape[-1]), [1, block[axis]], *bounds(bits))
    data = data.to(torch.int8).reshape(rows.shape).transpose(axis, -1).contiguous()
    scale = scale.reshape(*rows.shape[:-1], -1).transpose(axis, -1).contiguous()
    return data, scale


def _tokens(edit: Edit, node: fx.Node) -> None:
    x, ops, limits = node.args[0], torchao(), bounds(8)
    value = x.meta["val"]
    block = [*[1] * (value.dim() - 1), value.shape[-1]]
    with edit.after(node):
        qparams = edit.call(
            ops.choose_qparams_affine.default,
            *(x, "ASYMMETRIC", block, torch.int8, *limits, None, None, torch.int8),
        )
        scale, zero_point = (edit.call(operator.getitem, qparams, i) for i in range(2))
        quantize, dequantize = ops.quantize_affine.default, ops.dequantize_affine.default
        data = edit.call(quantize, x, block, scale, zero_point, torch.int8, *limits)
        result = edit.call(
            dequantize, data, block, scale, zero_point, torch.int8, *limits, value.dtype
        )
        node.replace_all_uses_with(result)


def _tensor(edit: Edit, node: fx.Node) -> None:
    x, observed = node.args[0], edit.tensor(node.args[1].target)
    if observed.is_meta or not observed[1] > observed[0]:
        raise UserError(
            f"`passes.convert`: what {module_of(node)[0]} is given was never observed; train for a "
            "step, or call graphtune.passes.qat.observe(program, batches)"
        )
    scale, zero_point = (one.item() for one in static_qparams(observed))
    ops, limits = torch.ops.quantized_decomposed, bounds(8)
    with edit.after(node):
        data = edit.call(ops.quantize_per_tensor.default, x, scale, zero_point, *limits, torch.int8)
        result = edit.call(
            ops.dequantize_per_tensor.default, data, scale, zero_point, *limits, torch.int8
        )
        node.replace_all_uses_with(edit.cast(result, x.meta["val"].dtype))
