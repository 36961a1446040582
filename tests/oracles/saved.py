"""What a training step keeps between its forward and its backward pass."""

import torch
from torch import Tensor


def saved_tensors(forward, own):
    """The loss, and the tensors that autograd saves for its backward pass, by storage.

    Args:
        forward: called without arguments; returns the loss. What is compiled counts as well, by
            what its forward hands on to its backward.
        own: tensors that are there anyway, such as parameters and the batch.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in there:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    return loss, list(saved.values())
