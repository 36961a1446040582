"""PEFT as the oracle of adapter passes: the same adapter on the same model."""

import copy

import peft
import torch
from torch import Tensor, nn

from graphtune.masks import causal_mask
from graphtune.program import Program
from tests.oracles.models import assert_same_tensors, gradients, random_ids

_PREFIX = "base_model.model."


def peft_model(model: nn.Module, adapter: str = "default", **options) -> nn.Module:
    """A copy of the model under PEFT, in train mode; rank 4 and alpha 8 unless told otherwise."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**config | options)
    return peft.get_peft_model(copy.deepcopy(model), config, adapter_name=adapter).train()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains in a PEFT model, under the names that a Program gives it."""
    return {
        name.removeprefix(_PREFIX).replace(".base_layer.bias", ".bias"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def same_start(reference: nn.Module, program: Program, seed: int = 5) -> None:
    """Give both the same trained-looking values, so that no part of the adapter is zero."""
    generator = torch.Generator().manual_seed(seed)
    theirs = trainable(reference)
    ours = {n: p for n, p in program.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.add_(noise.to(parameter.dtype))
            theirs[name].copy_(parameter)


def logits(reference: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return reference(input_ids=ids, attention_mask=mask, use_cache=False).logits


def assert_bitwise(program: Program, reference: nn.Module, *, mask: bool = False) -> None:
    """Logits and every gradient of what trains are the same bits.

    Args:
        mask: give the reference the causal mask too. Without one, transformers leaves the repeated
            keys and values to the attention kernel, which in half precision rounds otherwise.
    """
    ids = random_ids(3, 12)
    found = program(ids)
    expected = logits(reference, ids, causal_mask(ids, None) if mask else None)
    assert torch.equal(found, expected), f"{(found - expected).abs().max().item():.3g}"
    theirs = {
        n.removeprefix(_PREFIX).replace(".base_layer.bias", ".bias"): g
        for n, g in gradients(expected, reference).items()
    }
    assert_same_tensors(gradients(found, program), theirs)
