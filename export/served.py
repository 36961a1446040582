"""A program as those targets call it that have no other code of the model beside the file."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import PreTrainedTokenizerBase

from graphtune.errors import UserError
from graphtune.export.artifact import Artifact, evaluating, logits, probe_ids
from graphtune.program import Program

INPUTS = ("input_ids", "attention_mask")


class _Served(nn.Module):
    """Mask and positions come from which tokens are padding, as in transformers' generation."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.program(input_ids, attention_mask)


def exported(program: Program) -> ExportedProgram:
    """`forward(input_ids, attention_mask) -> logits`, with any batch and sequence length.

    `input_ids` and `attention_mask` (nonzero where a token is not padding) are int64 (batch, seq);
    logits are (batch, seq, vocab).

    Raises:
        UserError: the program has no weights yet, or its weights are quantized.
    """
    if program.deferred is not None:
        raise UserError("the program has no weights yet; graphtune.load_weights gives them")
    config = program.config
    positions = getattr(config and config.get_text_config(), "max_position_embeddings", None)
    batch = torch.export.Dim("batch", min=1)
    seq = torch.export.Dim("seq", min=1, max=positions)
    example = torch.ones(2, min(16, positions or 16), dtype=torch.int64, device=_device(program))
    with evaluating(program):
        # Non-strict: Dynamo does not trace a graph that torch.export made before.
        result = torch.export.export(
            _Served(program),
            (example, example.clone()),
            dynamic_shapes=({0: batch, 1: seq}, {0: batch, 1: seq}),
            strict=False,
        )
    # Who loads the file has torch, not the operators that give quantized weights back.
    own = [n for n in result.graph.nodes if getattr(n.target, "namespace", "") == "graphtune"]
    if own:
        raise UserError(
            f"the program uses {own[0].target}, an operator of graphtune, which no file for others "
            "can have; merge into a base that is not quantized (graphtune export does), or apply "
            "Merge(dequantize=True)"
        )
    return result


def check_served(
    made: Artifact,
    what: str,
    program: Program,
    run: Callable[[Tensor, Tensor], Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    tolerance: float | None,
) -> None:
    """Run what was written on one token, on a row of text, and on rows with padding.

    Args:
        run: takes `input_ids` and `attention_mask` on the program's device.
        tolerance: largest difference of a logit; None is that of the program's dtype.
    """
    text = probe_ids(program, tokenizer).to(_device(program))
    rows = torch.cat([text, text.flip(1), text])
    padded = torch.ones_like(rows)
    padded[1, : rows.shape[1] // 3] = 0
    padded[2, rows.shape[1] // 2 :] = 0
    cases = {
        "one token": (text[:, :1], torch.ones_like(text[:, :1])),
        f"{text.shape[1]} tokens": (text, torch.ones_like(text)),
        f"3 rows of {text.shape[1]}, padded": (rows, padded),
    }
    for name, inputs in cases.items():
        made.check(f"{what}, {name}", run(*inputs), logits(program, *inputs), tolerance)


def _device(program: nn.Module) -> torch.device:
    return next(program.parameters()).device
