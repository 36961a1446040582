"""Adapters in a file of their own, so that one program on a device runs with any of them.

A backend keeps the weights of its linears in its own form, and by what is in them: another adapter
would be another program. Here A and B are what the backend is given at each call, and the runtime
finds them in the adapter's file by their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphtune.errors import UserError
from graphtune.passes.adapters import is_adapter_parameter

if TYPE_CHECKING:
    from torch.export import ExportedProgram

aten = torch.ops.aten


def with_adapter_inputs(module: fx.GraphModule) -> fx.GraphModule:
    """A graph in which the factors of LoRA are operands of `bmm`, (1, in, out), and not weights.

    Args:
        module: of a program with a cache of one row; changed, but for its parameters, which a
            program shares.

    Raises:
        UserError: it has no adapter of its own, or one that does more than to add to linears.
    """
    graph = module.graph
    reads = [n for n in graph.find_nodes(op="get_attr") if is_adapter_parameter(n.target)]
    if not reads:
        raise UserError(
            "`adapter_file`: the program has no adapter apart from its weights (none was trained, "
            "or it is merged, as QAT does); leave it out"
        )
    for read in reads:
        if "lora_A." not in read.target and "lora_B." not in read.target:
            raise UserError(
                f"`adapter_file`: {read.target} is not a factor of LoRA on a linear, and would be "
                "in the program for all adapters; leave `adapter_file` out, which merges it"
            )
        for user in list(read.users):
            _multiply(graph, read, user)
        owner, _, leaf = read.target.rpartition(".")
        parent = module.get_submodule(owner)
        weight = getattr(parent, leaf)
        if weight.dim() == 2:  # not yet, for a module that is called twice
            turned = weight.detach().t().unsqueeze(0).contiguous()
            setattr(parent, leaf, torch.nn.Parameter(turned, requires_grad=False))
    module.recompile()
    return module


def _multiply(graph: fx.Graph, read: fx.Node, user: fx.Node) -> None:
    """Let a `bmm` take the place of a linear."""
    if user.target is not aten.linear.default or user.args[1] is not read or len(user.args) > 2:
        raise UserError(
            f"`adapter_file`: {read.target} is more than the weight of a linear, as LoRA's are "
            "(DoRA takes norms of merged weights, too); leave `adapter_file` out, which merges it"
        )
    x, shape = user.args[0], user.meta["val"].shape
    with graph.inserting_before(user):
        if len(shape) != 3:
            x = graph.call_function(aten.reshape.default, (x, [1, -1, x.meta["val"].shape[-1]]))
        out = graph.call_function(aten.bmm.default, (x, read))
        if len(shape) != 3:
            out = graph.call_function(aten.reshape.default, (out, [-1, shape[-1]]))
    out.meta = dict(user.meta)
    user.replace_all_uses_with(out)
    graph.erase_node(user)


def adapter_placeholders(exported: ExportedProgram) -> set[str]:
    """The inputs of a lowered graph that are parameters of an adapter."""
    parameters = exported.graph_signature.inputs_to_parameters
    return {name for name, target in parameters.items() if is_adapter_parameter(target)}


def without_adapters(partitioner: Any) -> Any:
    """The same partitioner of ExecuTorch, but that delegates are given adapters at each call."""
    from executorch.exir.backend.partitioner import Partitioner, PartitionResult

    class WithoutAdapters(Partitioner):
        def partition(self, exported_program: ExportedProgram) -> PartitionResult:
            result: PartitionResult = partitioner.partition(exported_program)
            apart = adapter_placeholders(result.tagged_exported_program)
            for node in result.tagged_exported_program.graph.find_nodes(op="placeholder"):
                if node.name in apart:
                    node.meta.pop("delegation_tag", None)
            return result

        def ops_to_not_decompose(self, ep: ExportedProgram) -> Any:
            return partitioner.ops_to_not_decompose(ep)

    return WithoutAdapters()
