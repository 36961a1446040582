"""Which dtype a model is loaded in: the one that was asked for, or what its device is fast in."""

from __future__ import annotations

import difflib

import torch

from graphtune.errors import UserError
from graphtune.models.sources import first_line

_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def resolve_dtype(dtype: torch.dtype | str, device: torch.device | str | None) -> torch.dtype | str:
    """What `load_model(dtype=dtype, device=device)` takes `dtype` to mean.

    `auto` depends on the device alone, whatever the checkpoint was saved in, so that one config
    trains alike from a float32 and from a bfloat16 checkpoint; see `fast_dtype`. On the meta
    device, which computes nothing, it is the checkpoint's own. A model that is loaded there first
    should be captured in the dtype that suits the device it will run on:
    `load_model(id, device="meta", dtype=resolve_dtype("auto", "cpu"))`.

    Returns:
        A torch dtype, or "auto" where it is the checkpoint's own.

    Raises:
        UserError: no such dtype or device.
    """
    device = resolve_device(device)
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return "auto" if device.type == "meta" else fast_dtype(device)
    if dtype not in _DTYPES:
        close = difflib.get_close_matches(str(dtype), ["auto", *_DTYPES], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use auto, {', '.join(_DTYPES)}"
        raise UserError(f"model.dtype: {dtype!r} is unknown; {hint}")
    return _DTYPES[dtype]


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has units that multiply matrices of it, else float32.

    Never float16: weights are trained in the dtype that they are loaded in, and its five bits of
    exponent let small gradients vanish and large activations overflow.
    """
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    """What is known of the hardware; nothing is measured, so that the answer never changes."""
    match device.type:
        case "cuda":
            with torch.cuda.device(device):
                return torch.cuda.is_bf16_supported(including_emulation=False)
        case "xpu":
            return torch.xpu.is_bf16_supported(including_emulation=False)
        case "mps":
            return torch.backends.mps.is_macos_or_newer(14, 0)  # before, it had none at all
        case "cpu":
            # Tiles (AMX) pay; AVX-512's dot products alone do not: what is saved in the product
            # is lost in putting its operands in order, and the rest of a model is slower.
            return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return False


def resolve_device(device: torch.device | str | None) -> torch.device:
    """A device that this machine has; None is torch's default.

    Raises:
        UserError: no such device.
    """
    if device is None:
        return torch.get_default_device()
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # what torch raises differs by backend
        raise UserError(
            f"model.device: {str(device)!r} cannot be used here ({first_line(error)}); "
            "this machine surely has 'cpu'"
        ) from error
