"""Which tokens see each other: masks, positions, and the documents of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def default_position_ids(input_ids: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Positions (batch, seq) that count from each row's first token that is not padding."""
    if padding_mask is not None and padding_mask.dim() == 2:
        return (padding_mask.long().cumsum(-1) - 1).clamp(min=0)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return positions.expand(input_ids.shape[0], -1)


def causal_mask(input_ids: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Bool (batch, 1, seq, seq): a query attends to itself and to earlier, unpadded keys.

    A padding position attends at least to itself, so that no row of the softmax is empty.
    """
    batch, length = input_ids.shape
    index = torch.arange(length, device=input_ids.device)
    causal = index[:, None] >= index[None, :]
    if padding_mask is None:
        return causal.expand(batch, 1, length, length)
    itself = index[:, None] == index[None, :]
    return causal & (padding_mask.bool()[:, None, None, :] | itself)


def find_documents(position_ids: Tensor) -> Tensor:
    """Where the documents of a batch lie.

    Not for what is compiled: how many there are depends on the positions.

    Args:
        position_ids: (batch, seq). A document begins with a row, and at each 0. What has one token
            is none: it sees itself alone, as padding does, whose positions are all 0.

    Returns:
        int64 (documents, 2) on the CPU: first position of each in the flattened batch, and last
        one + 1. Empty ones at the end make it at least 2, as symbolic sizes have to be.
    """
    begins = position_ids.cpu() == 0
    begins[:, 0] = True
    starts = begins.flatten().nonzero().squeeze(1)
    ends = F.pad(starts[1:], (0, 1), value=begins.numel())
    documents = torch.stack([starts, ends], 1)[ends - starts > 1]
    return F.pad(documents, (0, 0, 0, max(0, 2 - len(documents))))


def document_mask(documents: Tensor, input_ids: Tensor) -> Tensor:
    """Bool (batch, 1, seq, seq): a query attends to its document up to itself.

    Args:
        documents: as `find_documents` returns them.
        input_ids: (batch, seq), whose shape and device the mask is for.
    """
    numbers = -torch.arange(1, input_ids.numel() + 1)  # what is in no document is one by itself
    for number, (start, end) in enumerate(documents.tolist()):
        numbers[start:end] = number
    numbers = numbers.view(input_ids.shape).to(input_ids.device)
    same = numbers[:, None, :, None] == numbers[:, None, None, :]
    return same.tril()


def with_documents(program: Any, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A batch that tells which tokens see each other in the way that a program takes.

    Args:
        program: a `graphtune.Program`.
        batch: `input_ids`; of one without `attention_mask`, `position_ids` tell where each document
            begins; without both, each row is one.
    """
    if batch.get("attention_mask") is not None or batch.get("position_ids") is None:
        return batch
    documents = find_documents(batch["position_ids"])
    ids = batch["input_ids"]
    if program.packed is not None and ids.device.type == "cpu":
        batch = {**batch, "documents": documents}
        (mask,) = program.packed.graph.find_nodes(op="placeholder", target="attention_mask")
        if not mask.users:
            return batch
    elif not bool((documents[:, 0] % ids.shape[1]).any()):
        return batch  # no row has anything before its document
    return {**batch, "attention_mask": document_mask(documents, ids)}
