"""Loss on data that is not trained on."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from graphtune.losses import cross_entropy, labelled_tokens
from graphtune.program import Program


@torch.no_grad()
def evaluate_loss(program: Program, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean cross entropy over all labelled tokens of the batches, in nats per token; weighted, if
    batches have `weights`.

    Runs the graph operator by operator: two passes over a held-out set rarely pay for
    compiling a second graph. Dropout is off.
    """
    was_training = program.training
    program.eval()
    device = next(program.parameters()).device
    loss, tokens = 0.0, 0.0
    try:
        for batch in batches:
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            logits = program(
                on_device["input_ids"], on_device["attention_mask"], on_device["position_ids"]
            )
            weights = on_device.get("weights")
            loss += cross_entropy(logits, on_device["labels"], weights).item()
            tokens += labelled_tokens(on_device["labels"], weights).item()
    finally:
        program.train(was_training)
    return loss / tokens if tokens else 0.0
