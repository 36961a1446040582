"""Loss on data that is not trained on."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from graphtune.image_inputs import as_taken
from graphtune.losses import Loss, cross_entropy, labelled_tokens, loss_sum
from graphtune.program import Program


@torch.no_grad()
def evaluate_loss(
    program: Program, batches: Iterable[Mapping[str, Tensor]], loss: Loss = cross_entropy
) -> float:
    """Mean cross entropy over all labelled tokens of the batches, in nats per token; weighted, if
    batches have `weights`.

    Runs the graph operator by operator: two passes over a held-out set rarely pay for
    compiling a second graph. Dropout is off. Ranks that have other batches each take as many, and
    get the mean over all of them.

    Args:
        program: gives logits, or their loss.
        batches: see `TrainStep`.
        loss: of the logits, summed over the tokens.
    """
    was_training = program.training
    program.eval()
    device = program.device
    total, tokens = 0.0, 0.0
    try:
        for batch in batches:
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            total += loss_sum(program, as_taken(program, on_device), loss).item()
            tokens += labelled_tokens(on_device["labels"], on_device.get("weights")).item()
    finally:
        program.train(was_training)
    if program.distribution is not None:
        sums = torch.tensor([total, tokens], dtype=torch.float64, device=device)
        total, tokens = program.distribution.sum(sums).tolist()
    return total / tokens if tokens else 0.0
