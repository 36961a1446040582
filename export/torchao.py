"""A merged model quantized by torchao, in Hugging Face's layout, which transformers loads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TorchAoConfig

from graphtune.config import did_you_mean
from graphtune.errors import UserError
from graphtune.export.artifact import artifact, evaluating, logits, probe_ids
from graphtune.export.hf import write_hf
from graphtune.export.packages import require

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

FORMATS = ("int8", "int4")
_GROUP = 32
_UNQUANTIZED = "unquantized"  # folder of the model before, while it is quantized


def to_torchao(
    program: nn.Module,
    out_dir: str | Path,
    *,
    format: str = "int8",
    tokenizer: PreTrainedTokenizerBase | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    run: str | None = None,
) -> Path:
    """Write a model whose linears but the output head have weights of a few bits.

    `AutoModelForCausalLM.from_pretrained(out_dir)` gives it back, where torchao is installed;
    `config.json` holds its `TorchAoConfig`. Files are safetensors.

    - `int8`: one scale for each row (`Int8WeightOnlyConfig`).
    - `int4`: groups of 32 weights with a scale (`IntxWeightOnlyConfig`). Each weight has 16 values
      but takes a byte: the layouts that put two into a byte (`Int4WeightOnlyConfig`) are made and
      run by kernels of certain GPUs only.

    Args:
        program: as for `to_hf`: adapters merged, weights not quantized.
        out_dir: must be missing or empty; gets the model, the tokenizer, `manifest.json`.
        format: `int8` or `int4`.
        tokenizer: saved beside the weights; its ids are what is compared on.
        tolerance: largest difference of a logit to the program with the weights rounded, where
            logits reach 10 or less; None: 1e-4 for a float32 program. The difference to the
            program as it is, which rounding makes, is measured and kept in the manifest.
        overwrite, run: see `graphtune.export.artifact.artifact`.

    Returns:
        The folder.

    Raises:
        UserError: torchao is missing, `out_dir` holds something, there is no such format, or a
            weight does not divide into groups; and what `to_hf` raises.
        RuntimeError: the logits of what was written differ by more than `tolerance`.
    """
    require("torchao")
    if format not in FORMATS:
        raise UserError(f"to_torchao: `format={format}` is unknown{did_you_mean(format, FORMATS)}")
    packages = ("torch", "torchao", "transformers")
    with artifact(
        out_dir, "torchao", program, packages=packages, overwrite=overwrite, run=run
    ) as made:
        made.facts["format"] = format
        plain = made.path / _UNQUANTIZED
        plain.mkdir()
        write_hf(program, plain)
        _check_groups(program, format)
        device = next(program.parameters()).device
        options: dict[str, Any] = {"device_map": device} if device.type != "cpu" else {}
        quantized = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=TorchAoConfig(_config(format)), **options
        )
        quantized.save_pretrained(made.path)
        shutil.rmtree(plain)
        if tokenizer is not None:
            tokenizer.save_pretrained(made.path)
        del quantized
        loaded = AutoModelForCausalLM.from_pretrained(made.path, **options)
        ids = probe_ids(program, tokenizer)
        found = logits(loaded, ids)
        with evaluating(program):
            rounded = functional_call(program, _rounded(loaded), (ids.to(device),))
        rounded = getattr(rounded, "logits", rounded)
        made.check("transformers, to the program rounded", found, rounded, tolerance)
        made.measure(f"what {format} loses", found, logits(program, ids))
    return Path(out_dir)


def _config(format: str) -> AOBaseConfig:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if format == "int8":
        return Int8WeightOnlyConfig()
    return IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=PerGroup(_GROUP),
    )


def _check_groups(program: nn.Module, format: str) -> None:
    """torchao would say which weight it is only in a table on stderr."""
    for name, tensor in program.state_dict().items():
        linear = re.search(r"layers\.\d+\..*proj\.weight$", name)
        if format == "int4" and linear and tensor.shape[-1] % _GROUP:
            raise UserError(
                f"to_torchao: `format=int4` needs rows of a multiple of {_GROUP} weights, and "
                f"{name} has {tensor.shape[-1]}; choose int8"
            )


def _rounded(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that torchao holds quantized, as it gives them back."""
    return {
        name: parameter.dequantize()
        for name, parameter in model.named_parameters()
        if type(parameter.data) is not torch.Tensor
    }
