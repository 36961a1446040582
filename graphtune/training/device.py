"""Which device to train on, and how much memory a run took."""

import resource
import sys

import torch

from graphtune.errors import UserError


def pick_device(name: str = "auto") -> torch.device:
    """A device by name; `auto` takes the accelerator torch sees, else the CPU.

    Raises:
        UserError: no device of that name can be used here.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # what torch raises differs by backend
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"`device={name}` cannot be used here: {reason}") from error


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the accelerator's allocator, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
