"""What every captured graph needs before a pass can read it (the `normalize` stage).

`torch.export` leaves gradient-mode blocks that `torch.compile` refuses, assertions and casts
that do nothing, devices baked into nodes, dropout fixed to one mode, and tied weights read
under one name. Each function below mends one of these, in place.
"""

import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphtune.program import INPUTS
from graphtune.rewrite import insert_call
from graphtune.sites import find_sites, module_of
from graphtune.torch_private import is_grad_mode_block

aten = torch.ops.aten
BY = "capture"


def normalize(
    graph_module: fx.GraphModule, model: nn.Module, images: Sequence[str] = ()
) -> fx.Graph:
    """Mend a freshly exported graph; returns it.

    Args:
        graph_module: what `ExportedProgram.module()` gave.
        model: what was exported.
        images: names of what it takes besides ids, mask and positions.
    """
    graph = graph_module.graph
    graph.set_codegen(fx.graph.CodeGen())  # plain positional inputs, one tensor out
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    inline_grad_mode_blocks(graph_module, parameters)
    name_inputs_and_output(graph, images)
    drop_noise(graph)
    gather_images(graph)
    count_in_float(graph)
    follow_input_device(graph)
    switch_dropout(graph)
    read_own_weights(graph, parameters)
    drop_placeholder_stacks(graph)
    name_linears(graph, model)
    graph.eliminate_dead_code()
    graph.lint()
    return graph


def inline_grad_mode_blocks(
    graph_module: fx.GraphModule, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Replace each `with torch.no_grad():` block by its nodes.

    What a block computes from parameters must stay without a gradient, so that its outputs are
    detached; the rest (rotary angles) has none anyway.
    """
    graph = graph_module.graph
    while blocks := [node for node in graph.nodes if is_grad_mode_block(node)]:
        from_parameters = _derived(graph, parameters)
        for block in blocks:
            enabled, body, *inputs = block.args
            inner = getattr(graph_module, body.target).graph
            detach = not enabled and any(node in from_parameters for node in inputs)
            with graph.inserting_before(block):
                places = inner.find_nodes(op="placeholder")
                given = dict(zip(places, inputs, strict=True))
                results = graph.graph_copy(inner, given)
                _bring_constants(graph_module, body.target, given)
                if detach:
                    results = [_detached(graph, result, inputs) for result in results]
            for user in list(block.users):
                assert user.target is operator.getitem
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(block)
            if not body.users:
                graph.erase_node(body)


def _detached(graph: fx.Graph, result: fx.Node, inputs: Sequence[fx.Node]) -> fx.Node:
    """A result of a block without its gradient; an input that it hands back keeps its own.

    A cast that does nothing gives back the tensor itself, and the trace then takes whatever reads
    that tensor after the block for a reader of the cast.
    """
    source = result
    while _casts_to_same(source):
        source = source.args[0]
    if source in inputs:
        return source
    return insert_call(graph, aten.detach.default, result, origin=result, by=BY)


def _bring_constants(
    graph_module: fx.GraphModule, block: str, copies: Mapping[fx.Node, fx.Node]
) -> None:
    """Let copied nodes read the constants of their block from the whole graph's module."""
    for node, copy in copies.items():
        if node.op == "get_attr":
            value = getattr(getattr(graph_module, block), node.target)
            copy.target = f"{block}_{node.target}"
            graph_module.register_buffer(copy.target, value, persistent=False)


def _derived(graph: fx.Graph, parameters: Mapping[str, nn.Parameter]) -> set[fx.Node]:
    derived: set[fx.Node] = set()
    for node in graph.nodes:
        own = node.op == "get_attr" and node.target in parameters
        if own or any(source in derived for source in node.all_input_nodes):
            derived.add(node)
    return derived


def name_inputs_and_output(graph: fx.Graph, images: Sequence[str]) -> None:
    """Call the inputs by their names, and let the graph return the logits by themselves."""
    first = next(iter(graph.nodes))
    for name, node in zip((*INPUTS, *images), graph.find_nodes(op="placeholder"), strict=True):
        node.target = node.name = name
        if node is not first:
            first.prepend(node)
    output = graph.output_node()
    (logits,) = output.args[0]
    output.args = (logits,)


def drop_noise(graph: fx.Graph) -> None:
    """Drop assertions on metadata, aliases, and casts and copies that do nothing.

    Whether a tensor was contiguous already, so that no copy was recorded, differs by the device
    that was traced; `reshape` copies by itself where it must.
    """
    for node in list(graph.nodes):
        if node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
            graph.erase_node(node)
        elif node.target is aten.alias.default or _casts_to_same(node) or _copies_to_reshape(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.view.default and _laid_out_by_attention(node.args[0]):
            node.target = aten.reshape.default


def gather_images(graph: fx.Graph) -> None:
    """Let each token that stands for a part of an image fetch its features.

    `masked_scatter` deals them out instead, whose gradient has as many values as the mask has
    tokens: a size that no graph can hold. What is fetched is the same.
    """
    for node in graph.find_nodes(op="call_function", target=aten.masked_scatter.default):
        embedded, mask, features = node.args
        width = embedded.meta["val"].shape[-1]
        if mask.meta["val"].shape[-1] != 1:
            continue  # it chooses values, and not tokens
        with graph.inserting_before(node):
            call = partial(insert_call, graph, origin=node, by=BY)
            flat = call(aten.reshape.default, mask, [-1])
            number = call(aten.cumsum.default, flat, 0)
            number = call(aten.clamp.default, call(aten.sub.Tensor, number, 1), 0)
            rows = call(aten.reshape.default, features, [-1, width])
            fetched = call(aten.index_select.default, rows, 0, number)
            fetched = call(aten.view_as.default, fetched, embedded)
            merged = call(aten.where.self, mask, fetched, embedded)
        node.replace_all_uses_with(merged)
        graph.erase_node(node)


def _laid_out_by_attention(node: fx.Node) -> bool:
    """Whether the strides of a result are those that attention chose, which differ by device."""
    keeps = (aten.mul.Tensor, aten.transpose.int, aten.to.dtype, aten.reshape.default)
    while node.target in keeps and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.target is aten.scaled_dot_product_attention.default


def drop_placeholder_stacks(graph: fx.Graph) -> None:
    """Forget the module stack that torch writes on nodes which no module made."""
    for node in graph.nodes:
        if any("_empty_nn_module_stack" in name for name in node.meta.get("nn_module_stack", ())):
            node.meta["nn_module_stack"] = {}


def name_linears(graph: fx.Graph, model: nn.Module) -> None:
    """Let what a subclass of `nn.Linear` made say that a linear made it: sites go by the class."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        name, kind = module_of(node)
        if name in linears and not kind.endswith(".Linear"):
            stack = dict(node.meta["nn_module_stack"])
            stack[next(reversed(stack))] = (name, "torch.nn.modules.linear.Linear")
            node.meta["nn_module_stack"] = stack


def count_in_float(graph: fx.Graph) -> None:
    """Let counts of tokens by expert be taken from floats, whatever device was traced.

    `transformers` counts integers except on a CPU, which cannot; floats can be counted everywhere
    and are exact up to 2**24 tokens.
    """
    for node in graph.find_nodes(op="call_function", target=aten.histc.default):
        ids: Any = node.args[0]
        if ids.meta["val"].is_floating_point():
            continue
        if ids.target is aten.to.dtype:
            ids = ids.args[0]
        with graph.inserting_before(node):
            cast = insert_call(graph, aten.to.dtype, ids, torch.float32, origin=node, by=BY)
            count = insert_call(
                graph, node.target, cast, *node.args[1:], origin=node, by=BY, **node.kwargs
            )
        node.replace_all_uses_with(count)
        graph.erase_node(node)


_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default)


def _casts_to_same(node: fx.Node) -> bool:
    if node.target not in _CASTS:
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    return before.dtype == after.dtype and before.device == after.device


def _copies_to_reshape(node: fx.Node) -> bool:
    reshaped = all(user.target is aten.reshape.default for user in node.users)
    return node.target is aten.contiguous.default and len(node.args) == 1 and reshaped


def follow_input_device(graph: fx.Graph) -> None:
    """Make every node that names a device name the device of `input_ids` instead."""
    ids = next(iter(graph.nodes))
    named = [n for n in graph.nodes if any(isinstance(a, torch.device) for a in _flat(n))]
    if not named:
        return
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "call_function")):
        device = insert_call(graph, getattr, ids, "device", origin=ids, by=BY)
    for node in named:
        node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
        node.kwargs = {
            key: device if isinstance(a, torch.device) else a for key, a in node.kwargs.items()
        }


def _flat(node: fx.Node) -> list[Any]:
    return [*node.args, *node.kwargs.values()]


def switch_dropout(graph: fx.Graph) -> None:
    """Let dropout, also attention's own, read the `training` flag when the graph runs.

    Dropout with probability 0 goes: it does nothing in either mode, and a graph that reads the flag
    is compiled for each.
    """
    drops = []
    for node in graph.find_nodes(op="call_function", target=aten.dropout.default):
        if node.args[1]:
            drops.append(node)
        else:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    attends = [
        site.node
        for site in find_sites(graph)
        if site.kind == "attention" and _dropout_p(site.node) > 0
    ]
    if not drops and not attends:
        return
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "call_function")):
        training = graph.create_node("get_attr", "training")
        training.meta.update(val=True, custom={"graphtune": BY})
    for node in drops:
        node.update_arg(2, training)
    for node in attends:
        with graph.inserting_before(node):
            p = insert_call(graph, operator.mul, training, _dropout_p(node), origin=node, by=BY)
        if len(node.args) > 4:
            node.update_arg(4, p)
        else:
            node.update_kwarg("dropout_p", p)


def _dropout_p(node: fx.Node) -> float:
    return node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)


def read_own_weights(graph: fx.Graph, parameters: Mapping[str, nn.Parameter]) -> None:
    """Let each site read its weight under its own module's name.

    After `torch.export` all users of a tied weight read one of its names. With each its own,
    replacing the weight of one (quantizing `lm_head`) cannot leak into the other.
    """
    for site in list(find_sites(graph)):
        if site.weight is None or site.weight.op != "get_attr":
            continue
        own = f"{site.name}.weight"
        shared: Tensor | None = parameters.get(own)
        if own != site.weight.target and shared is parameters.get(site.weight.target):
            with graph.inserting_before(site.weight):
                read = graph.create_node("get_attr", own)
            read.meta = dict(site.weight.meta)
            site.node.replace_input_with(site.weight, read)
