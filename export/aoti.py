"""A program compiled ahead of time by AOTInductor: machine code that Python and C++ load."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from graphtune.export.artifact import artifact
from graphtune.export.served import check_served, exported
from graphtune.program import Program
from graphtune.torch_private import compile_package, load_package

MODEL = "model.pt2"


def to_aoti(
    program: Program,
    out_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    run: str | None = None,
) -> Path:
    """Compile to a package `model.pt2`, load it and compare its logits.

    The package runs on the kind of device that the program is on. In Python
    `torch._inductor.aoti_load_package("model.pt2")(input_ids, attention_mask)` gives the logits,
    in C++ `torch::inductor::AOTIModelPackageLoader`; both inputs are int64 (batch, seq), of any
    size, the mask nonzero where a token is not padding. Needs a C++ compiler.

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
        RuntimeError: the logits of the package differ by more than `tolerance`.
    """
    with artifact(out_dir, "aoti", program, overwrite=overwrite, run=run) as made:
        compile_package(exported(program), made.path / MODEL)
        loaded = load_package(made.path / MODEL)
        check_served(made, MODEL, program, loaded, tokenizer, tolerance)
        if tokenizer is not None:
            tokenizer.save_pretrained(made.path)
    return Path(out_dir)
