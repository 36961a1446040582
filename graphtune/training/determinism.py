"""Seeds, and a mode in which equal runs give equal bits."""

import os
import random

import numpy as np
import torch


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed the generators of Python, NumPy and torch (all devices).

    Call it before the first use of CUDA: cuBLAS reads its setting when it starts.

    Args:
        seed: in [0, 2**32).
        deterministic: use only algorithms that give the same bits each time, on the same machine
            and with the same number of threads. Some are slower.

    An operator that has no such algorithm raises RuntimeError, and names itself.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
