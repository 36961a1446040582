"""The operators of torchao, which integers in a graph are read with."""

from __future__ import annotations

from typing import Any

from graphtune.errors import UserError


def torchao() -> Any:
    """`torch.ops.torchao`, with its affine operators.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        import torchao.quantization  # noqa: F401  (defines them)
    except ImportError as error:
        raise UserError(
            f"integer weights need torchao ({error}): pip install graphtune[executorch]"
        ) from error
    import torch.ao.quantization.fx._decomposed  # noqa: F401  (those for whole tensors)

    return torch.ops.torchao
