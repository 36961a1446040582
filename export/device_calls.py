"""How a device calls a program, and whether a lowered one answers such calls as the eager one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphtune.export.artifact import Artifact
from graphtune.fake_quantization import rounds_inputs
from graphtune.passes.kv_cache import cache_of, reset
from graphtune.program import Program
from graphtune.verify import nudged

Run = Callable[..., Tensor]
_STEPS = 64  # tokens that are decoded to compare
# Of the largest logit, at least: a rounding may take a quantized input to the next integer.
_ROUNDING = 0.1


class WholeText(nn.Module):
    """`forward(input_ids (1, seq)) -> logits (1, seq, vocab)`: causal, counted from 0."""

    def __init__(self, program: nn.Module, max_seq_len: int) -> None:
        super().__init__()
        self.program, self.most = program, max_seq_len

    def forward(self, input_ids: Tensor) -> Tensor:
        position = torch.arange(input_ids.shape[1])
        mask = (position[:, None] >= position[None, :])[None, None]
        out = self.program(input_ids=input_ids, attention_mask=mask, position_ids=position[None])
        return out if isinstance(out, Tensor) else out.logits

    def inputs(self, ids: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        return (ids.contiguous(),)

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        return ({1: torch.export.Dim("seq", min=1, max=self.most)},)

    def constants(self) -> dict[str, Any]:
        return {
            "get_max_seq_len": self.most,
            "get_max_context_len": self.most,
            "use_kv_cache": False,
        }


class NewTokens(nn.Module):
    """`forward(tokens (1, n), input_pos (n,)) -> logits (1, 1, vocab)`, of a program with a cache.

    n goes from 1 to `prefill` of the `KVCache`; the positions of a text count up from 0. Of the
    same program, `graph` may be another that computes the same.
    """

    def __init__(self, program: Program, graph: nn.Module | None = None) -> None:
        super().__init__()
        options = cache_of(program)
        assert options is not None
        self.program, self.length = graph or program.graph_module, options.length
        self.most = options.prefill or options.length

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        return self.program(tokens, input_pos[None])

    def inputs(self, ids: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        return ids.contiguous(), torch.arange(start, start + ids.shape[1])

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        count = torch.export.Dim("n", min=1, max=self.most)
        return ({1: count}, {0: count})

    def constants(self) -> dict[str, Any]:
        return {
            "get_max_seq_len": self.most,  # of one call: the runner gives longer prompts in parts
            "get_max_context_len": self.length,
            "use_kv_cache": True,
        }


def check_calls(
    made: Artifact,
    run: Run,
    call: WholeText | NewTokens,
    program: nn.Module,
    probe: Tensor,
    tolerance: float,
) -> dict[str, Any]:
    """Compare a lowered program with the eager one.

    Args:
        made: gets the checks.
        run: the lowered program, with the inputs of `call`.
        call: the eager program, as a device calls it.
        program: the eager program without a cache, if there is one.
        probe: token ids, int64 (1, n), as many as one call takes.
        tolerance: see `Artifact.check_difference`.

    Returns:
        What was measured, by the names of `ExecutorchReport`.

    Raises:
        RuntimeError: a logit differs by more.
    """
    text, measured = probe, {}
    prompts = [probe[:, :n] for n in sorted({1, min(16, probe.shape[1]), probe.shape[1]})]
    found = [run(*call.inputs(prompt)).flatten(0, 1) for prompt in prompts]
    expected = [call(*call.inputs(prompt)).flatten(0, 1) for prompt in prompts]
    share = 0.0
    if isinstance(program, Program) and rounds_inputs(program.graph):
        with nudged(program):
            moved = [call(*call.inputs(prompt)).flatten(0, 1) for prompt in prompts]
        difference, largest = _difference(torch.cat(moved), torch.cat(expected))
        share = max(_ROUNDING, 2 * difference / largest)
    start = time.perf_counter()
    run(*call.inputs(probe))
    measured["prefill_tokens_per_s"] = probe.shape[1] / (time.perf_counter() - start)
    if isinstance(call, NewTokens):
        try:
            text, answers, eager, seconds = _decode(run, call, probe)
        finally:
            if isinstance(program, Program):  # which may be the one with the cache
                reset(program)
        found.append(answers)
        expected.append(eager)
        measured |= {
            "decode_tokens_per_s": (len(answers) - 1) / seconds,
            "greedy_tokens": len(answers),
            "greedy_equal": int((answers.argmax(-1) == eager.argmax(-1)).sum()),
            "greedy_gap": (eager.amax(-1) - _at(eager, answers.argmax(-1))).max().item(),
        }
    difference, largest = _difference(torch.cat(found), torch.cat(expected))
    made.check_difference("the lowered program", difference, largest, tolerance, share)
    if isinstance(call, NewTokens) and getattr(program, "takes_mask", False):
        whole = program(text)[0, -len(answers) :]
        made.check_difference(
            "its greedy answer, beside the whole text read at once",
            *_difference(answers, whole),
            tolerance,
            share,
        )
    return {**measured, "max_abs_diff": difference, "max_abs_logit": largest}


def _decode(run: Run, call: NewTokens, probe: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Read a prompt, and go on with the tokens that the eager program likes best.

    Returns:
        The text, (1, n), but for the last token; logits of the lowered and of the eager program
        for what follows each of its last tokens, (steps, vocab); and the seconds of all steps but
        the first, which reads the prompt.
    """
    steps = min(_STEPS, call.length - 1)
    text = probe[:, : max(1, min(call.most, call.length - steps + 1))]
    answers, eager, seconds, new, position = [], [], 0.0, text, 0
    for step in range(steps):
        inputs = call.inputs(new, position)
        start = time.perf_counter()
        answers.append(run(*inputs)[0, -1:])
        seconds += (time.perf_counter() - start) if step else 0.0
        eager.append(call(*inputs)[0, -1:])
        position = text.shape[1]
        new = eager[-1].argmax(-1)[None]
        if step < steps - 1:
            text = torch.cat([text, new], dim=1)
    return text, torch.cat(answers), torch.cat(eager), seconds


def _at(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(-1, tokens[:, None])[:, 0]


def _difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest |difference| and largest |logit|."""
    return (found - expected).abs().max().item(), expected.abs().max().item()


def load(path: Any, data: Any | None = None) -> Run:
    """The method `forward` of a `.pte` file, in ExecuTorch's Python runtime.

    Args:
        data: the `.ptd` file with those of its weights that are not in it.
    """
    import executorch.kernels.quantized  # noqa: F401  # its operators look up quantized embeddings

    if data is None:
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")
        return lambda *inputs: method.execute(inputs)[0]
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    module = _load_for_executorch(str(path), str(data))
    module.method_meta("forward")  # loads it
    return lambda *inputs: module.forward(inputs)[0]


def special_ids(sources: tuple[Any, ...]) -> Mapping[str, Any]:
    """`get_bos_id` and `get_eos_ids`, from configs and tokenizers."""
    bos = [i for s in sources if (i := getattr(s, "bos_token_id", None)) is not None]
    eos: dict[int, None] = {}  # in order, each once
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        eos.update(dict.fromkeys([] if ids is None else ids if isinstance(ids, list) else [ids]))
    found: dict[str, Any] = {"get_bos_id": bos[0]} if bos else {}
    return found | ({"get_eos_ids": list(eos)} if eos else {})
