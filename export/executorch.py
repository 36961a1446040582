"""Lower a program to an ExecuTorch file for CPUs (XNNPACK), and prove the file before keeping it.

The file has one method, `forward(input_ids (1, seq)) -> logits (1, seq, vocab)`, without a
key-value cache, and the constants that ExecuTorch's LLM runner asks for.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphtune.errors import UserError
from graphtune.export.artifact import Artifact, artifact, evaluating
from graphtune.export.packages import require
from graphtune.export.xnnpack import (
    XnnpackForms,
    coverage,
    integer_weights,
    partitioner,
    quantizes_inputs,
    undelegated_matmuls,
)

if TYPE_CHECKING:
    from executorch.runtime import Method
    from transformers import PreTrainedTokenizerBase

MODEL = "model.pte"
TOKENIZER = "tokenizer.json"
_PROBE = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all."


@dataclass(frozen=True)
class ExecutorchReport:
    """What `to_executorch` made, and how far it is from the eager program.

    Attributes:
        path: the `.pte` file.
        size_bytes: its size.
        lowering_s: seconds from the program to the written file.
        load_s: seconds to load it into the runtime.
        max_abs_diff: largest |difference| of a logit to eager, from one token to `max_seq_len`.
        max_abs_logit: largest |logit| there, for scale.
        delegates: number of subgraphs that XNNPACK runs.
        coverage: operator -> (nodes that XNNPACK runs, nodes that it does not).
        prefill_tokens_per_s: at `max_seq_len` tokens, on this machine.
    """

    path: Path
    size_bytes: int
    lowering_s: float
    load_s: float
    max_abs_diff: float
    max_abs_logit: float
    delegates: int
    coverage: Mapping[str, tuple[int, int]]
    prefill_tokens_per_s: float

    @property
    def delegated_nodes(self) -> int:
        return sum(inside for inside, _ in self.coverage.values())

    @property
    def undelegated_nodes(self) -> int:
        return sum(outside for _, outside in self.coverage.values())


def to_executorch(
    program: nn.Module,
    out_dir: str | Path,
    *,
    max_seq_len: int = 512,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tolerance: float = 1e-4,
    overwrite: bool = False,
    run: str | None = None,
) -> ExecutorchReport:
    """Lower a float32 program to `model.pte`, run it, and keep it only if it agrees with eager.

    Beside it lie `tokenizer.json`, if a tokenizer is given, and `manifest.json` with the sizes
    and SHA-256 of both. The folder appears whole or not at all.

    Where inputs of linears are quantized (`Convert`), a difference of rounding may take a number to
    the next integer; there a logit may differ by a tenth of the largest one.

    Args:
        program: forward takes `input_ids`, `attention_mask` (bool, batch x 1 x seq x seq) and
            `position_ids`, and returns logits (batch, seq, vocab); adapters merged, on the CPU.
            Capture a model with sliding windows first: transformers does not lay them into a
            mask that it is given, a Program does.
        out_dir: must be missing or empty.
        max_seq_len: tokens that the file takes at most; its memory is planned for that many.
        tokenizer: gives the ids of its special tokens and the text of the probe.
        tolerance: largest difference of a logit, where logits reach 10 or less.
        overwrite, run: see `graphtune.export.artifact.artifact`.

    Raises:
        UserError: executorch is not installed; `out_dir` holds something; the program is not
            float32 or not on the CPU; `max_seq_len` does not suit the model; a matrix product
            with a weight would not run in XNNPACK.
        RuntimeError: the file's logits differ from the eager ones by more than that.
    """
    require("executorch")
    _check(program, max_seq_len)
    tokenizer_json = _tokenizer_json(tokenizer)
    packages = ("torch", "executorch")
    with artifact(
        out_dir, "executorch", program, packages=packages, overwrite=overwrite, run=run
    ) as made:
        file = made.path / MODEL
        with evaluating(program):
            probe, vocab_size = _probe(program, tokenizer, max_seq_len)
            metadata = _metadata(program, tokenizer, max_seq_len, vocab_size)
            start = time.perf_counter()
            delegates, coverage = _lower(program, file, max_seq_len, metadata)
            lowering_s = time.perf_counter() - start
            measured = _verify(made, program, file, probe, tolerance)
        report = ExecutorchReport(
            path=Path(out_dir) / MODEL,
            size_bytes=file.stat().st_size,
            lowering_s=lowering_s,
            delegates=delegates,
            coverage=coverage,
            **measured,
        )
        if tokenizer_json is not None:
            (made.path / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        made.facts |= {
            "metadata": metadata,
            "report": {
                **{k: v for k, v in asdict(report).items() if k not in ("path", "coverage")},
                "delegated_nodes": report.delegated_nodes,
                "undelegated_nodes": report.undelegated_nodes,
            },
        }
    return report


def _check(program: nn.Module, max_seq_len: int) -> None:
    positions = getattr(getattr(program, "config", None), "max_position_embeddings", None)
    if max_seq_len < 2 or (positions and max_seq_len > positions):
        raise UserError(
            f"`max_seq_len={max_seq_len}` must be at least 2 and at most the model's "
            f"positions, {positions or 'without a limit'}"
        )
    for name, tensor in [*program.named_parameters(), *program.named_buffers()]:
        if tensor.device.type != "cpu":
            raise UserError(f"to_executorch: {name} is on {tensor.device}; program.to('cpu') first")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UserError(
                f"to_executorch: {name} is {tensor.dtype}, and XNNPACK is given float32; "
                "load the model with dtype=float32"
            )


# ---------------------------------------------------------------------------- lowering


class _OnDevice(nn.Module):
    """The program as the device calls it: one row of tokens, causal, counted from 0."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, input_ids: Tensor) -> Tensor:
        position = torch.arange(input_ids.shape[1])
        mask = (position[:, None] >= position[None, :])[None, None]
        out = self.program(input_ids=input_ids, attention_mask=mask, position_ids=position[None])
        return out if isinstance(out, Tensor) else out.logits


def _lower(
    program: nn.Module, path: Path, max_seq_len: int, metadata: Mapping[str, Any]
) -> tuple[int, dict[str, tuple[int, int]]]:
    """Write the file; returns the number of delegates, and the coverage by operator."""
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

    example = torch.zeros(1, max(2, max_seq_len // 2), dtype=torch.int64)
    seq = torch.export.Dim("seq", min=1, max=max_seq_len)
    with warnings.catch_warnings():
        # ExecuTorch copies pytree specs by a name that torch 2.13 deprecates, at each delegate.
        warnings.simplefilter("ignore", FutureWarning)
        with XnnpackForms():
            # Non-strict: Dynamo does not trace a graph that torch.export made before.
            exported = torch.export.export(
                _OnDevice(program), (example,), dynamic_shapes=({1: seq},), strict=False
            )
        edge = to_edge_transform_and_lower(
            exported, partitioner=[partitioner()], constant_methods=dict(metadata)
        )
        tables, left = integer_weights(edge)
        if left:
            raise UserError(
                f"to_executorch: XNNPACK runs no linear with such integer weights and inputs: "
                f"{left[0]}; quantize by the scheme 8da4w or 8da8w, embeddings by int4 or int8"
            )
        if missed := undelegated_matmuls(edge):
            raise UserError(
                f"to_executorch: {len(missed)} matrix products with a weight would not run in "
                f"XNNPACK, the first is {missed[0]}; a file with them would be slow"
            )
        covered = coverage(edge)  # before to_executorch, which adds memory to the graph
        # It fuses quantized embeddings; without any there is nothing to do.
        config = ExecutorchBackendConfig(do_quant_fusion_and_const_prop=bool(tables))
        with path.open("wb") as file:
            edge.to_executorch(config).write_to_file(file)
    return covered


def _metadata(
    program: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    max_seq_len: int,
    vocab_size: int,
) -> dict[str, Any]:
    """The constants that ExecuTorch's LLM runner reads (extension/llm/runner/constants.h)."""
    sources = (
        getattr(program, "generation_config", None),
        getattr(program, "config", None),
        tokenizer,
    )
    bos = [i for s in sources if (i := getattr(s, "bos_token_id", None)) is not None]
    eos: dict[int, None] = {}  # in order, each once
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        eos.update(dict.fromkeys([] if ids is None else ids if isinstance(ids, list) else [ids]))
    metadata: dict[str, Any] = {
        "get_max_seq_len": max_seq_len,
        "get_max_context_len": max_seq_len,
        "get_vocab_size": vocab_size,
        "use_kv_cache": False,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
    }
    if bos:
        metadata["get_bos_id"] = bos[0]
    if eos:
        metadata["get_eos_ids"] = list(eos)
    return metadata


# ---------------------------------------------------------------------------- verification


def _probe(
    program: nn.Module, tokenizer: PreTrainedTokenizerBase | None, max_seq_len: int
) -> tuple[Tensor, int]:
    """Token ids (1, max_seq_len) to compare on, and the size of the vocabulary."""
    vocab_size = _OnDevice(program)(torch.zeros(1, 2, dtype=torch.int64)).shape[-1]
    if tokenizer is not None:
        ids = torch.tensor(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    else:
        ids = (torch.arange(max_seq_len) * 7919 + 1) % vocab_size
    repeats = -(-max_seq_len // ids.numel())
    return ids.repeat(repeats)[None, :max_seq_len].contiguous(), vocab_size


def _verify(
    made: Artifact, program: nn.Module, path: Path, probe: Tensor, tolerance: float
) -> dict[str, float]:
    """Run the file beside the eager program; what was measured, by the report's names."""
    from executorch.runtime import Runtime

    start = time.perf_counter()
    method = Runtime.get().load_program(path).load_method("forward")
    load_s = time.perf_counter() - start

    lengths = sorted({1, min(16, probe.shape[1]), probe.shape[1]})
    compared = [_compare(program, method, probe[:, :length]) for length in lengths]
    difference, largest = (max(column) for column in zip(*compared, strict=True))
    share = 0.1 if quantizes_inputs(program) else 0.0
    made.check_difference("the lowered program", difference, largest, tolerance, share)
    start = time.perf_counter()
    method.execute([probe])
    prefill = probe.shape[1] / (time.perf_counter() - start)
    return {
        "max_abs_diff": difference,
        "max_abs_logit": largest,
        "load_s": load_s,
        "prefill_tokens_per_s": prefill,
    }


def _compare(program: nn.Module, method: Method, ids: Tensor) -> tuple[float, float]:
    """Largest |difference| and largest |logit| over all positions."""
    expected = _OnDevice(program)(ids)
    difference = method.execute([ids.contiguous()])[0] - expected
    return difference.abs().max().item(), expected.abs().max().item()


# ---------------------------------------------------------------------------- beside the file


def _tokenizer_json(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"to_executorch: a {type(tokenizer).__name__} has no tokenizer.json form, which the "
            "device reads; load a fast tokenizer, or pass no tokenizer"
        )
    return backend.to_str(pretty=True)
