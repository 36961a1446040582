"""What an operator makes of some shapes is worked out once, and only where they are the same."""

import torch
from torch import fx

from graphtune.shapes import of_call
from graphtune.torch_private import symbolic_inputs

aten = torch.ops.aten


def with_input(batch: int | None = None) -> tuple[fx.Graph, fx.Node]:
    graph = fx.Graph()
    ids = graph.placeholder("input_ids")
    ids.meta["val"], _, _ = symbolic_inputs(torch.device("cpu"), batch)
    return graph, ids


def value(graph: fx.Graph, target: object, *args: object) -> object:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta["val"] = of_call(node)
    return node.meta["val"]


def test_equal_calls_have_one_value_and_others_their_own() -> None:
    graph, ids = with_input()
    doubled = value(graph, aten.cat.default, [ids, ids], 1)
    assert value(graph, aten.cat.default, [ids, ids], 1) is doubled
    assert value(graph, aten.cat.default, [ids, ids], 0) is not doubled
    assert value(graph, aten.add.Tensor, ids, 1).dtype == torch.int64
    assert value(graph, aten.add.Tensor, ids, 1.0).dtype == torch.float32
    assert value(graph, aten.mul.Tensor, ids, True).dtype == torch.int64
    other, its_ids = with_input(batch=4)
    assert value(other, aten.cat.default, [its_ids, its_ids], 0).shape[0] == 8


def test_the_same_symbols_of_another_world_are_other_sizes() -> None:
    graph, ids = with_input()
    before = value(graph, aten.neg.default, ids)
    ids.meta["val"], _, _ = symbolic_inputs(torch.device("cpu"))
    after = value(graph, aten.neg.default, ids)
    assert str(before.shape) == str(after.shape)
    assert after.fake_mode is ids.meta["val"].fake_mode is not before.fake_mode
