"""A program as ONNX, for onnxruntime and the tools that read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graphtune.errors import UserError
from graphtune.export.artifact import artifact
from graphtune.export.packages import require
from graphtune.export.served import INPUTS, check_served, exported
from graphtune.program import Program

MODEL = "model.onnx"


def to_onnx(
    program: Program,
    out_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    run: str | None = None,
) -> Path:
    """Write `model.onnx` and `model.onnx.data`, run them in onnxruntime and compare the logits.

    Inputs are `input_ids` and `attention_mask`, int64 (batch, seq), of any size, the mask nonzero
    where a token is not padding; the output is `logits`, (batch, seq, vocab).

    Args:
        program: in float32, its weights not quantized; adapters stay as they are.
        out_dir: must be missing or empty; gets the model, the tokenizer, `manifest.json`.
        tokenizer: saved beside the program; its ids are what is compared on.
        tolerance: largest difference of a logit, where logits reach 10 or less; None: 1e-4.
        overwrite, run: see `graphtune.export.artifact.artifact`.

    Returns:
        The folder.

    Raises:
        UserError: a package is missing, `out_dir` holds something, the program is not plain float32
            on the CPU, or an operator of it has no form in ONNX.
        RuntimeError: the logits of the file differ by more than `tolerance`.
    """
    require("onnx")
    for name, parameter in program.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise UserError(
                f"to_onnx: {name} is {parameter.dtype} on {parameter.device}, and onnxruntime "
                "compares in float32 on the CPU; load the model with dtype=float32 there"
            )
    packages = ("torch", "onnx", "onnxscript", "onnxruntime")
    with artifact(
        out_dir, "onnx", program, packages=packages, overwrite=overwrite, run=run
    ) as made:
        try:
            model = torch.onnx.export(exported(program), dynamo=True, verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"to_onnx: {str(error.__cause__ or error).strip()}") from error
        assert model is not None
        model.model.graph.outputs[0].name = "logits"
        model.save(made.path / MODEL, external_data=True)  # one file holds at most 2 GB
        session = _session(made.path / MODEL)

        def run_session(*inputs: Tensor) -> Tensor:
            feeds = {name: x.numpy() for name, x in zip(INPUTS, inputs, strict=True)}
            return torch.from_numpy(session.run(["logits"], feeds)[0])

        check_served(made, "onnxruntime", program, run_session, tokenizer, tolerance)
        if tokenizer is not None:
            tokenizer.save_pretrained(made.path)
    return Path(out_dir)


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
