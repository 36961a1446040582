"""What graphtune uses of torch's private surface, so that a move of it fails here first."""

import inspect

import pytest
import torch

from graphtune import torch_private


class _UnderNoGrad(torch.nn.Module):
    def forward(self, x):
        with torch.no_grad():
            y = x.cos()
        return x * y


def exported():
    x = torch.zeros(3, 4)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(_UnderNoGrad(), (x,), dynamic_shapes=({0: batch},), strict=False)
    return program.module(check_guards=False).graph


def test_gradient_mode_blocks_are_recognised():
    blocks = [node for node in exported().nodes if torch_private.is_grad_mode_block(node)]
    assert len(blocks) == 1
    enabled, _, *inputs = blocks[0].args
    assert enabled is False
    assert len(inputs) == 1


def test_shapes_propagate_symbolically():
    value = exported().find_nodes(op="placeholder")[0].meta["val"]
    assert torch_private.is_fake(value)
    assert not torch_private.is_fake(torch.zeros(1))
    weight = torch_private.fake_parameter(value, (5, 4), torch.float32)
    result = torch_private.propagate(value, torch.ops.aten.linear.default, (value, weight), {})
    assert torch_private.is_fake(result)
    symbol = torch_private.size_symbol(result.shape[0])
    assert symbol == torch_private.size_symbol(value.shape[0]) is not None
    assert torch_private.size_symbol(result.shape[1]) is None
    assert torch_private.size_at(result.shape[0], {symbol: 7}) == 7
    assert torch_private.size_at(result.shape[0] * 2 + 1, {symbol: 7}) == 15
    assert torch_private.size_at(5, {}) == 5


def test_symbolic_inputs_have_free_sizes():
    ids, mask, positions = torch_private.symbolic_inputs(torch.device("cpu"))
    batch, seq = map(torch_private.size_symbol, ids.shape)
    assert batch and seq and batch != seq
    assert [torch_private.size_symbol(size) for size in mask.shape] == [batch, None, seq, seq]
    assert [torch_private.size_symbol(size) for size in positions.shape] == [batch, seq]
    doubled = torch_private.propagate(ids, torch.ops.aten.cat.default, ([ids, ids], 1), {})
    assert torch_private.size_at(doubled.shape[1], {batch: 3, seq: 5}) == 10


def test_the_partitioner_has_a_budget():
    from torch._functorch import config

    before = config.activation_memory_budget
    with torch_private.memory_budget(0.25):
        assert config.activation_memory_budget == 0.25
    assert config.activation_memory_budget == before == 1


@pytest.mark.slow
def test_programs_are_compiled_ahead_of_time(tmp_path):
    x = torch.randn(3, 4)
    program = torch.export.export(_UnderNoGrad(), (x,), strict=False)
    torch_private.compile_package(program, tmp_path / "model.pt2")
    torch.testing.assert_close(torch_private.load_package(tmp_path / "model.pt2")(x), x * x.cos())


def test_sizes_that_vary_are_compiled_once_and_graphs_are_counted():
    torch._dynamo.reset()
    function = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)
    before = torch_private.compiled_graphs()
    for rows in (2, 5, 7):
        x = torch.zeros(rows, 3)
        torch_private.vary(x, (0,))
        function(x)
    assert torch_private.compiled_graphs() == before + 1
    torch_private.vary(one := torch.zeros(1, 3), (0,))  # allowed, though a constant
    function(one)
    assert torch_private.compiled_graphs() == before + 2


def test_the_history_of_an_allocator_is_where_it_was(tmp_path):
    memory = torch.cuda.memory
    inspect.signature(memory._record_memory_history).bind(enabled=None)
    inspect.signature(memory._dump_snapshot).bind(str(tmp_path))
    assert not torch_private.start_memory_history(torch.device("cpu"))


def test_processes_are_pretended():
    import torch.distributed as dist

    with torch_private.pretended_processes(6):
        assert (dist.get_rank(), dist.get_world_size()) == (0, 6)
        dist.all_reduce(torch.ones(2))  # waits for nobody
    assert not dist.is_initialized()


def test_causal_attention_has_a_kernel_for_its_gradients():
    given = [torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(3)]
    expected = torch.nn.functional.scaled_dot_product_attention(*given, is_causal=True)
    slope = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, given, slope)
    with torch.no_grad():
        out, logsumexp = torch_private.causal_attention_on_cpu(*given, 0.5)
        found = torch_private.causal_attention_on_cpu_backward(slope, *given, out, logsumexp, 0.5)
    torch.testing.assert_close(out, expected)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
