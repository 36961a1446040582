"""Lower a program to an ExecuTorch file for devices, and prove the file before keeping it.

The file has one method, `forward(tokens (1, n), input_pos (n,)) -> logits (1, 1, vocab)`, with a
key-value cache in mutable buffers; or `forward(input_ids (1, seq)) -> logits (1, seq, vocab)`
without. Either comes with the constants that ExecuTorch's LLM runner asks for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from graphtune.errors import UserError
from graphtune.export.adapter_file import with_adapter_inputs
from graphtune.export.artifact import artifact, evaluating
from graphtune.export.custom_attention import load_custom_ops, with_custom_attention
from graphtune.export.device_calls import NewTokens, WholeText, check_calls, load, special_ids
from graphtune.export.device_tokenizer import check_tokenizer, write_tokenizer
from graphtune.export.executorch_backends import BACKENDS, partitioners
from graphtune.export.lowering import lower
from graphtune.export.packages import require
from graphtune.passes.kv_cache import KVCache, cache_of
from graphtune.program import Program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL = "model.pte"
WEIGHTS = "model.ptd"
ADAPTER = "adapter.ptd"
PREFILL = 128  # tokens of a prompt that are read at once
_PROBE = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all."


@dataclass(frozen=True)
class ExecutorchReport:
    """What `to_executorch` made, and how far it is from the eager program.

    What comes from running it is None where this machine's runtime has not the backend.

    Attributes:
        path: the `.pte` file.
        backend: what runs it.
        size_bytes: its size, with that of its weights where they are apart.
        lowering_s: seconds from the program to the written file.
        delegates: number of subgraphs that the backend runs.
        coverage: operator -> (nodes that the backend runs, nodes that it does not).
        load_s: seconds to load it into the runtime.
        max_abs_diff: largest |difference| of a logit to eager, from one token to as many as fit
            into a call, and where it decodes.
        max_abs_logit: largest |logit| there, for scale.
        prefill_tokens_per_s: with as many tokens as one call takes, on this machine.
        decode_tokens_per_s: one by one, on this machine; None without a cache.
        greedy_tokens: how many tokens it decoded.
        greedy_equal: at how many of them its likeliest token was the eager program's.
        greedy_gap: where it was not, how much less likely the program thinks it, in logits, at
            most: a tie that rounding broke, or more.
        tokenizer: see `graphtune.export.device_tokenizer.write_tokenizer`; None without one.
    """

    path: Path
    backend: str
    size_bytes: int
    lowering_s: float
    delegates: int
    coverage: Mapping[str, tuple[int, int]]
    load_s: float | None = None
    max_abs_diff: float | None = None
    max_abs_logit: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    greedy_tokens: int | None = None
    greedy_equal: int | None = None
    greedy_gap: float | None = None
    tokenizer: Mapping[str, Any] | None = None

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
    kv_cache: bool = True,
    max_seq_len: int = 512,
    prefill: int | None = None,
    backend: str = "xnnpack",
    split_weights: bool = False,
    adapter_file: bool = False,
    custom_sdpa: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tolerance: float = 1e-4,
    overwrite: bool = False,
    run: str | None = None,
) -> ExecutorchReport:
    """Lower a float32 program to `model.pte`, run it, and keep it only if it agrees with eager.

    Beside it lie `tokenizer.json`, if a tokenizer is given, and `manifest.json` with the sizes
    and SHA-256 of all files. The folder appears whole or not at all.

    With a cache, a prompt and 64 greedy tokens are compared with the eager program, with its cache
    and without. Where inputs of linears are quantized (`Convert`), a difference of rounding may
    take a number to the next integer; there a logit may differ by a tenth of the largest one, or
    by twice what a change of the norms' weights in their last bits makes.

    Args:
        program: a Program, with `KVCache` of one row applied or without; adapters merged, but for
            `adapter_file`; on the CPU. Without a cache also a module whose forward takes
            `input_ids`, `attention_mask` (bool, batch x 1 x seq x seq) and `position_ids`, and
            returns logits (batch, seq, vocab); but of a model with sliding windows only its
            Program: transformers does not lay them into a mask that it is given.
        out_dir: must be missing or empty.
        kv_cache: keep keys and values from call to call.
        max_seq_len: tokens of a text at most, prompt and answer together; the file's memory is
            planned for that many.
        prefill: tokens that one call takes at most, with a cache; None: 128, or `max_seq_len`.
        backend: what runs it; one of `graphtune.export.executorch_backends.BACKENDS`.
        split_weights: write the weights to `model.ptd`, apart from the program.
        adapter_file: write LoRA's factors to `adapter.ptd`, apart from the program, which does not
            depend on them: it runs with the file of any adapter of the same options.
        custom_sdpa: compute attention by the kernels of ExecuTorch's `custom_ops` library, which
            what runs the file must have too.
        tokenizer: gives the ids of its special tokens and the text of the probe.
        tolerance: largest difference of a logit, where logits reach 10 or less.
        overwrite, run: see `graphtune.export.artifact.artifact`.

    Raises:
        UserError: executorch is not installed, or has not the backend; `out_dir` holds something;
            the program is not float32 or not on the CPU, or has no cache that is known;
            `max_seq_len` or the tokenizer does not suit the model; `adapter_file` without LoRA,
            or with more than that; an operator, or a matrix product with a weight, would not run in
            the backend.
        RuntimeError: the file's logits differ from the eager ones by more than that.
    """
    require("executorch")
    given = partitioners(backend)
    for option, given_it in (("custom_sdpa", custom_sdpa), ("adapter_file", adapter_file)):
        if given_it and not kv_cache:
            raise UserError(
                f"`{option}` is for files with a key-value cache; leave out `kv_cache=False`"
            )
    if adapter_file and split_weights:
        raise UserError(
            "`adapter_file` and `split_weights`: ExecuTorch's Python runtime, which checks the "
            "file, reads one file of weights; leave out one of them"
        )
    biases = {row.options.get("bias", "none") for row in getattr(program, "ledger", ())}
    if adapter_file and biases - {"none"}:
        raise UserError(
            "`adapter_file`: the adapter trained biases, which would be in the program for all "
            "adapters; leave `adapter_file` out, which merges it"
        )
    if custom_sdpa:
        load_custom_ops()
    _check(program, max_seq_len)
    check_tokenizer(tokenizer, _vocab_size(program))
    packages = ("torch", "executorch")
    with (
        artifact(
            out_dir, "executorch", program, packages=packages, overwrite=overwrite, run=run
        ) as made,
        evaluating(program),
    ):
        call: WholeText | NewTokens
        lowered_call: WholeText | NewTokens
        if kv_cache:
            cached = _with_cache(program, max_seq_len, prefill)
            call = NewTokens(cached)
            graph = with_custom_attention(cached) if custom_sdpa else None
            if adapter_file:
                graph = with_adapter_inputs(graph or fx.GraphModule(cached, deepcopy(cached.graph)))
            lowered_call = NewTokens(cached, graph)
        else:
            call = lowered_call = WholeText(program, max_seq_len)
        file = made.path / MODEL
        apart = WEIGHTS if split_weights else ADAPTER if adapter_file else None
        data = made.path / apart if apart else None
        constants = _constants(program, tokenizer, call)
        constants["use_sdpa_with_kv_cache"] = custom_sdpa
        start = time.perf_counter()
        lowered = lower(lowered_call, file, constants, backend, given, data, adapter_file)
        facts: dict[str, Any] = {"lowering_s": time.perf_counter() - start}
        facts["size_bytes"] = sum(one.stat().st_size for one in made.path.iterdir())
        if BACKENDS[backend].runs_here:
            start = time.perf_counter()
            loaded = load(file, data)
            facts["load_s"] = time.perf_counter() - start
            probe = _probe(tokenizer, call.most, constants["get_vocab_size"])
            facts |= check_calls(made, loaded, call, program, probe, tolerance)
        if tokenizer is not None:
            facts["tokenizer"] = write_tokenizer(tokenizer, made.path)
        report = ExecutorchReport(
            Path(out_dir) / MODEL, backend, delegates=lowered[0], coverage=lowered[1], **facts
        )
        made.facts |= {
            "metadata": constants,
            "method": "forward(tokens, input_pos)" if kv_cache else "forward(input_ids)",
            "was_run": BACKENDS[backend].runs_here,
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
                f"to_executorch: {name} is {tensor.dtype}, and ExecuTorch is given float32; "
                "load the model with dtype=float32"
            )


def _with_cache(program: nn.Module, max_seq_len: int, prefill: int | None) -> Program:
    if not isinstance(program, Program):
        raise UserError(
            "to_executorch: a key-value cache is made in a graph; give graphtune.capture(model), "
            "or kv_cache=False"
        )
    part = min(PREFILL, max_seq_len) if prefill is None else prefill
    if not 2 <= part <= max_seq_len:
        raise UserError(f"`prefill={part}` must be from 2 to `max_seq_len={max_seq_len}`")
    if (options := cache_of(program)) is not None:
        if options.batch != 1:
            raise UserError(
                f"to_executorch: the program's cache has {options.batch} rows, and devices read "
                "one; give the program without a cache, or KVCache(batch=1)"
            )
        return program
    try:
        made = program.apply(KVCache(max(8, max_seq_len), 1, part, logits="last"))
    except UserError as error:
        raise UserError(f"{error}: kv_cache=False (--no-kv-cache)") from error
    return made.eval()


def _vocab_size(program: nn.Module) -> int:
    config = getattr(program, "config", None)
    return config.get_text_config().vocab_size if config is not None else 2**63


def _constants(
    program: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    call: WholeText | NewTokens,
) -> dict[str, Any]:
    """The constants that ExecuTorch's LLM runner reads (extension/llm/runner/constants.h)."""
    config = getattr(program, "config", None)
    sources = (getattr(program, "generation_config", None), config, tokenizer)
    return {
        **call.constants(),
        "get_vocab_size": call(*call.inputs(torch.zeros(1, 2, dtype=torch.int64))).shape[-1],
        "enable_dynamic_shape": True,
        **special_ids(sources),
    }


def _probe(tokenizer: PreTrainedTokenizerBase | None, length: int, vocab_size: int) -> Tensor:
    """Token ids (1, length) to compare on: of a text, or spread over the vocabulary."""
    if tokenizer is not None:
        ids = torch.tensor(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    else:
        ids = (torch.arange(length) * 7919 + 1) % vocab_size
    return ids.repeat(-(-length // ids.numel()))[None, :length].contiguous()
