"""FuseAdapters makes fewer and cheaper products, of the same values."""

from collections import Counter

import pytest
import torch

import graphtune as gt
from graphtune.passes import FuseAdapters, LoRA
from graphtune.torch_private import TensorMode
from tests.oracles.models import random_ids, tiny_model

aten = torch.ops.aten


@pytest.fixture(scope="module")
def llama():
    return gt.capture(tiny_model("llama"))


class Products(TensorMode):
    """Counts matrix products by their shapes, and the numbers that multiplications give."""

    def __init__(self):
        super().__init__()
        self.shapes, self.scaled = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is aten.mm.default:
            self.shapes[*args[0].shape, args[1].shape[1]] += 1
        if func is aten.mul.Tensor and not isinstance(args[1], torch.Tensor):
            self.scaled += result.numel()
        return result


def counted(program):
    ids = random_ids(2, 16)
    with Products() as products:
        program(ids).square().sum().backward()
    return products


def test_adapters_of_one_input_are_one_product(llama):
    """Widths 32 and 48, keys and values 16; rank 3; 32 tokens; two layers."""
    program = llama.apply(LoRA(rank=3))
    before, after = counted(program), counted(program.apply(FuseAdapters()))
    # A: of q, k, v and of gate, up together; o and down alone.
    assert before.shapes[32, 32, 3] >= 2 * 6
    assert after.shapes[32, 32, 9] == 2
    assert after.shapes[32, 32, 6] == 2
    # Their gradients: 3 + 2 products become 1 + 1.
    assert after.shapes[9, 32, 32] == after.shapes[6, 32, 32] == 2
    # A layer has 3 fewer of A, of its gradient and of its input's; the first's q, k, v have none.
    assert before.shapes.total() - after.shapes.total() == 2 * 9 - 2


def test_gradients_of_b_are_products_of_a_short_matrix(llama):
    """(rank, tokens) by (tokens, out), where out is 48 for gate and up."""
    program = llama.apply(LoRA(rank=3))
    before, after = counted(program), counted(program.apply(FuseAdapters()))
    assert before.shapes[48, 32, 3] == 2 * 2 and before.shapes[3, 32, 48] == 2
    assert after.shapes[48, 32, 3] == 0 and after.shapes[3, 32, 48] == 2 + 2 * 2


def test_scaling_is_of_the_low_rank_alone(llama):
    program = llama.apply(LoRA(rank=3))
    before, after = counted(program), counted(program.apply(FuseAdapters()))
    outputs = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)  # of two layers, for each of 32 tokens
    saved = 2 * 32 * (outputs - 2 * 7 * 3)  # in the forward and in the backward pass
    assert before.scaled - after.scaled == saved


def test_adapters_that_drop_differently_stay_apart(llama):
    program = llama.apply(LoRA(rank=3, dropout=0.1)).apply(FuseAdapters())
    assert not program.graph.find_nodes(op="call_function", target=aten.split_with_sizes.default)


def test_float32_adapters_of_a_half_precision_model():
    model = tiny_model("llama").to(torch.bfloat16)
    program = gt.capture(model).apply(LoRA(rank=3))
    with torch.no_grad():
        for name, parameter in program.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    fused = program.apply(FuseAdapters())
    splits = fused.graph.find_nodes(op="call_function", target=aten.split_with_sizes.default)
    assert len(splits) == 4
    ids = random_ids(2, 9)
    expected = program(ids).float()
    off = (fused(ids).float() - expected).norm() / expected.norm()
    assert off.item() < 0.02


def test_no_adapters_no_change(llama):
    program = llama.apply(FuseAdapters())
    assert program.ledger[-1].sites == () and program.ledger[-1].nodes == 0
