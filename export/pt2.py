"""A program as `torch.export` saves it: a graph and weights that torch alone loads and runs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from graphtune.export.artifact import artifact
from graphtune.export.served import check_served, exported
from graphtune.program import Program

MODEL = "model.pt2"


def to_pt2(
    program: Program,
    out_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    run: str | None = None,
) -> Path:
    """Write `model.pt2`, load it again and compare its logits.

    `torch.export.load("model.pt2").module()(input_ids, attention_mask)` gives the logits; both
    are int64 (batch, seq), of any size, the mask nonzero where a token is not padding.

    Args:
        program: with weights that are not quantized; adapters stay as they are.
        out_dir: must be missing or empty; gets `model.pt2`, the tokenizer, `manifest.json`.
        tokenizer: saved beside the program; its ids are what is compared on.
        tolerance: largest difference of a logit, where logits reach 10 or less; None: 1e-4 for a
            float32 program.
        overwrite, run: see `graphtune.export.artifact.artifact`.

    Returns:
        The folder.

    Raises:
        UserError: `out_dir` holds something, the program has no weights yet, or they are quantized.
        RuntimeError: the logits of the file differ by more than `tolerance`.
    """
    with artifact(out_dir, "pt2", program, overwrite=overwrite, run=run) as made:
        torch.export.save(exported(program), made.path / MODEL)
        loaded = torch.export.load(made.path / MODEL).module()
        with torch.no_grad():
            check_served(made, MODEL, program, loaded, tokenizer, tolerance)
        if tokenizer is not None:
            tokenizer.save_pretrained(made.path)
    return Path(out_dir)
