"""Adapters and quantized weights put together by hand, as a module in the eager model."""

from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4


def round_trip(weight: Tensor, storage: str) -> Tensor:
    """The weight (out, in) as it comes back from being stored, by torchao."""
    if storage == "nf4":
        return to_nf4(weight.contiguous(), 64, 256).get_original_weight()
    if storage == "int8":
        linear = nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight = nn.Parameter(weight.clone())
        quantize_(linear, Int8WeightOnlyConfig())
        return linear.weight.dequantize()
    return weight


class ByHand(nn.Module):
    """A linear with its weight stored as asked, and LoRA or DoRA over it.

    DoRA is written as the paper does, with the whole adapted weight.
    """

    def __init__(self, linear: nn.Linear, storage: str, scaling: float, *factors: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(round_trip(linear.weight.detach(), storage))
        self.bias = linear.bias
        self.scaling = scaling
        self.a, self.b, *magnitude = factors
        self.magnitude = magnitude[0] if magnitude else None

    def forward(self, x: Tensor) -> Tensor:
        if self.magnitude is None:
            base = F.linear(x, self.weight, self.bias)
            update = F.linear(F.linear(x.to(self.a.dtype), self.a), self.b)
            return (base + update * self.scaling).to(x.dtype)
        adapted = self.weight.to(self.a.dtype) + self.scaling * (self.b @ self.a)
        norm = adapted.norm(dim=1, keepdim=True)
        weight = self.magnitude[:, None] * adapted / norm
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def put_in(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
