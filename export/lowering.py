"""From a module to a `.pte` file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graphtune.errors import UserError
from graphtune.export.adapter_file import adapter_placeholders, without_adapters
from graphtune.export.device_calls import NewTokens, WholeText
from graphtune.export.xnnpack import (
    XnnpackForms,
    coverage,
    integer_weights,
    undelegated_matmuls,
)

Coverage = dict[str, tuple[int, int]]


def lower(
    call: WholeText | NewTokens,
    path: Path,
    constants: Mapping[str, Any],
    backend: str,
    partitioners: list[Any],
    data: Path | None = None,
    adapters_only: bool = False,
) -> tuple[int, Coverage]:
    """Write a call of a program as the method `forward` of a file.

    Args:
        call: what is lowered.
        constants: methods without inputs, by name.
        backend: its name, for messages.
        partitioners: of the backend; none for portable operators.
        data: a file for weights, apart from the program.
        adapters_only: only those of adapters; see `graphtune.export.adapter_file`.

    Returns:
        The number of delegates; and of each operator, how many nodes run in them, and how many
        do not.

    Raises:
        UserError: the backend has not an operator, or a matrix product would not run in it.
    """
    with warnings.catch_warnings():
        # ExecuTorch copies pytree specs by a name that torch 2.13 deprecates, at each delegate.
        warnings.simplefilter("ignore", FutureWarning)
        # What a cache holds at first is never seen.
        warnings.filterwarnings("ignore", "Mutation on a buffer", UserWarning)
        try:
            return _lower(call, path, constants, backend, partitioners, data, adapters_only)
        except (UserError, OSError):
            raise
        except Exception as error:  # of many kinds, from torch.export to a backend's compiler
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"to_executorch: {backend} cannot run this program: {type(error).__name__}: "
                f"{reason}"
            ) from error


def _lower(
    call: WholeText | NewTokens,
    path: Path,
    constants: Mapping[str, Any],
    backend: str,
    partitioners: list[Any],
    data: Path | None,
    adapters_only: bool,
) -> tuple[int, Coverage]:
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

    if adapters_only:
        partitioners = [without_adapters(one) for one in partitioners]
    edge = to_edge_transform_and_lower(
        _export(call, None if adapters_only else data),
        partitioner=partitioners,
        constant_methods=dict(constants),
    )
    tables, left = integer_weights(edge)
    if left:
        raise UserError(
            f"to_executorch: {backend} runs no linear with such integer weights and inputs: "
            f"{left[0]}; for xnnpack quantize by the scheme 8da4w or 8da8w, embeddings by int4 or "
            "int8"
        )
    if partitioners and (missed := undelegated_matmuls(edge)):
        raise UserError(
            f"to_executorch: {len(missed)} matrix products with a weight would not run in "
            f"{backend}, the first is {missed[0]}; a file with them would be slow"
        )
    covered = coverage(edge)  # before to_executorch, which adds memory to the graph
    adapters = adapter_placeholders(edge.exported_program())
    config = ExecutorchBackendConfig(
        # It fuses quantized embeddings; without any there is nothing to do.
        do_quant_fusion_and_const_prop=bool(tables),
        # Else each call copies all caches, twice. With portable operators, which read views of a
        # cache, ExecuTorch 1.4 computes NaN after it.
        run_reinplace_pass=backend == "xnnpack",
        external_constants=data is not None
        and (lambda node: data.stem if not adapters_only or node.name in adapters else None),
    )
    made = edge.to_executorch(config)
    with path.open("wb") as file:
        made.write_to_file(file)
    if data is not None:
        made.write_tensor_data_to_file(str(data.parent))
    return covered


def _export(call: WholeText | NewTokens, weights: Path | None) -> torch.export.ExportedProgram:
    length = max(2, call.most // 2)  # of the example, which must not look like a constant
    example = call.inputs(torch.zeros(1, length, dtype=torch.int64))
    shapes = call.dynamic_shapes()
    with XnnpackForms():
        # Non-strict: Dynamo does not trace a graph that torch.export made before.
        exported = torch.export.export(call, example, dynamic_shapes=shapes, strict=False)
    if weights is None:
        return exported
    from executorch.exir.passes.external_constants_pass import (
        delegate_external_constants_pass_unlifted,
    )

    # Delegates keep their weights themselves, and are told where by a mark on each.
    module = exported.module()
    delegate_external_constants_pass_unlifted(module, lambda node: weights.stem)
    return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
