"""Adapters in PEFT's layout, out and in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from graphtune.errors import UserError
from graphtune.passes.lora import LoRA
from graphtune.program import LedgerRow, Program

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."  # PEFT wraps the model twice, and its keys say so
_INIT = {"kaiming": True, "gaussian": "gaussian"}


def to_peft(program: Program, out_dir: str | Path) -> Path:
    """Write the program's adapter as PEFT does, so that PEFT, vLLM and others load it.

    Args:
        program: with a LoRA that is not merged.
        out_dir: made if missing; gets `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        UserError: the program has no adapter.
    """
    row = _lora_row(program)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _PREFIX + name: parameter.detach().cpu().contiguous()
        for name, parameter in program.named_parameters()
        if ".lora_" in name
    }
    config = {**_peft_config(row), "base_model_name_or_path": program.source}
    # Each file appears whole or not at all, the weights last: a folder with weights is complete.
    _replace(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    return folder


def from_peft(program: Program, adapter_dir: str | Path) -> Program:
    """Apply the adapter that lies in a folder in PEFT's layout.

    Args:
        program: the base model, without adapters.
        adapter_dir: has `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        UserError: a file is missing, the adapter uses what `LoRA` has not, or its tensors are
            those of another model.
    """
    folder = Path(adapter_dir)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"adapter: {folder} has no {name}; give a folder in PEFT's layout")
    config = json.loads((folder / CONFIG).read_text())
    saved = {k.removeprefix(_PREFIX): v for k, v in load_file(folder / WEIGHTS).items()}
    tuned = program.apply(_lora(config, saved))
    ours = {name: p for name, p in tuned.named_parameters() if ".lora_" in name}
    for name in sorted(ours.keys() ^ saved.keys()):
        where = "has no tensor" if name in ours else "has a tensor that the model has not:"
        raise UserError(f"adapter: {folder / WEIGHTS} {where} {name}")
    with torch.no_grad():
        for name, parameter in ours.items():
            if parameter.shape != saved[name].shape:
                raise UserError(
                    f"adapter: {name} has shape {tuple(saved[name].shape)}, the model needs "
                    f"{tuple(parameter.shape)}; was it trained on another base?"
                )
            parameter.copy_(saved[name])
    return tuned


def _lora_row(program: Program) -> LedgerRow:
    names = [row.name for row in program.ledger]
    if LoRA.name not in names or "merge" in names:
        raise UserError("export.peft: the program has no adapter; apply LoRA, and do not merge it")
    return next(row for row in program.ledger if row.name == LoRA.name)


def _peft_config(row: LedgerRow) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": row.options["rank"],
        "lora_alpha": row.options["alpha"],
        "lora_dropout": row.options["dropout"],
        "use_rslora": row.options["rslora"],
        "init_lora_weights": _INIT[row.options["init"]],
        "target_modules": list(row.sites),
        "bias": "none",
        "inference_mode": True,
    }


# Options of PEFT that change what an adapter computes, with the value that LoRA stands for.
_UNSUPPORTED = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "trainable_token_indices": None,
    "target_parameters": None,
}


def _lora(config: dict[str, Any], saved: dict[str, torch.Tensor]) -> LoRA:
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"adapter: peft_type {config.get('peft_type')!r} is not supported; only LORA"
        )
    for key, plain in _UNSUPPORTED.items():
        if config.get(key) not in (plain, None):
            raise UserError(f"adapter: {key}={config[key]!r} is not supported")
    return LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        rslora=config.get("use_rslora", False),
        targets=tuple(sorted({name.partition(".lora_")[0] for name in saved})),
    )


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.replace(path)
