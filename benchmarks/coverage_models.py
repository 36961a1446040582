"""Which causal language models of `transformers` can be captured and trained: all, one by one.

    python -m benchmarks.coverage_models [NAME ...] [--cache FILE] [--document FILE]

Builds a tiny random model of every architecture in `transformers`' causal-LM mapping from its own
configuration, and takes it through the chain: eager forward, capture, logits and gradients against
eager, LoRA on all linears, a training step, and the adapter out to PEFT's layout and in again.
Each architecture runs in a process of its own with a time limit. Results are kept in the cache;
those that are named are run again, those that are missing are run, the rest is read from it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import graphtune as gt
from benchmarks.tiny_models import tiny_model
from graphtune.capture import capture
from graphtune.engine import compile_step
from graphtune.export.peft import from_peft, to_peft
from graphtune.passes import LoRA
from graphtune.program import Program
from graphtune.sites import Site, find_sites

TIMEOUT = 150
STAGES = ("eager", "capture", "logits", "gradients", "lora", "step", "peft")

# Linears that only choose what is attended to, which no gradient comes through: no place for LoRA.
NO_GRADIENT = dict.fromkeys(
    ("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4"), ["*.indexer.*"]
)


def names() -> list[str]:
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    """Token ids, none of which is special."""
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


def eager_logits(model: nn.Module, ids: Tensor) -> Tensor:
    torch.manual_seed(0)
    accepted = inspect.signature(model.forward).parameters
    cached = "use_cache" in accepted or any(p.kind == p.VAR_KEYWORD for p in accepted.values())
    output = model(input_ids=ids, **({"use_cache": False} if cached else {}))
    return output.logits if hasattr(output, "logits") else output[0]


def program_logits(program: Program, ids: Tensor) -> Tensor:
    torch.manual_seed(0)
    return program(ids)


def gradients(logits: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a scalar that depends on every logit unevenly, by parameter name."""
    weights = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    loss = (logits * weights).sum() + logits.logsumexp(-1).sum()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest value expected; 0 if bitwise equal."""
    if not torch.isfinite(expected).all():
        raise ValueError("eager gives values that are not finite")
    if torch.equal(found, expected):
        return 0.0
    scale = max(float(expected.abs().max()), 1e-30)
    return float((found - expected).abs().max()) / scale


class Chain:
    """One model on its way; each stage raises what is wrong with it, or returns a difference."""

    def __init__(self, name: str) -> None:
        self.model = tiny_model(name)
        self.ids = random_ids(2, 17)
        self.skip = NO_GRADIENT.get(name, [])

    def eager(self) -> float:
        logits = eager_logits(self.model, self.ids)
        if logits.shape[:2] != self.ids.shape or logits.dim() != 3:
            raise ValueError(f"eager gives logits {tuple(logits.shape)}")
        return difference(eager_logits(self.model, self.ids), logits)

    def capture(self) -> float:
        self.program = capture(self.model)
        return 0.0

    def logits(self) -> float:
        worst = 0.0
        for training in (False, True):
            self.model.train(training), self.program.train(training)
            for ids in (self.ids, random_ids(4, 9)):
                expected = eager_logits(self.model, ids)
                worst = max(worst, difference(program_logits(self.program, ids), expected))
        return _within(worst, 1e-5)

    def gradients(self) -> float:
        expected = gradients(eager_logits(self.model, self.ids), self.model)
        found = gradients(program_logits(self.program, self.ids), self.program)
        zero = {n for n, g in expected.items() if not g.any()}
        if missing := (found.keys() ^ expected.keys()) - zero:
            raise ValueError(f"{sorted(missing)[0]} has a gradient in one of eager and program")
        scale = max(float(g.abs().max()) for g in expected.values())
        worst = 0.0
        for name in found:
            if not torch.equal(found[name], expected[name]):
                own = max(float(expected[name].abs().max()), 1e-3 * scale)
                worst = max(worst, float((found[name] - expected[name]).abs().max()) / own)
        return _within(worst, 1e-4)

    def lora(self) -> float:
        narrow = [place.name for place in find_sites(self.program.graph) if _narrow(place)]
        skip = [{"sites": sites, "skip": True} for sites in [narrow, self.skip] if sites]
        self.tuned = self.program.apply(LoRA(rank=2, targets=(*skip, "all-linear")))
        return difference(
            program_logits(self.tuned, self.ids), program_logits(self.program, self.ids)
        )

    def step(self) -> float:
        before = [p.detach().clone() for p in self.tuned.trainable_parameters()]
        optimizer = torch.optim.AdamW(self.tuned.trainable_parameters(), lr=1e-3)
        step = compile_step(self.tuned, optimizer, compile=False)
        losses = [step({"input_ids": self.ids, "labels": self.ids})["loss"] for _ in range(3)]
        after = list(self.tuned.trainable_parameters())
        if not all(torch.isfinite(p).all() for p in after) or losses != losses:
            raise ValueError("a parameter or the loss is not finite after a step")
        if all(torch.equal(a, b) for a, b in zip(after, before, strict=True)):
            raise ValueError("no parameter changed in a step")
        if losses[-1] >= losses[0]:
            raise ValueError(f"the loss rose from {losses[0]:.6f} to {losses[-1]:.6f}")
        return 0.0

    def peft(self) -> float:
        with tempfile.TemporaryDirectory() as folder:
            to_peft(self.tuned, folder)
            again = from_peft(self.program, folder)
        found = program_logits(again.eval(), self.ids)
        return _within(difference(found, program_logits(self.tuned.eval(), self.ids)), 0.0)


def _narrow(place: Site) -> bool:
    """Whether a rank of 2 is too much for a site."""
    return place.in_all_linear and min(place.shape[-2:]) < 2


def _within(worst: float, limit: float) -> float:
    if not worst <= limit:
        raise ValueError(f"differs by {worst:.2g} of the largest value")
    return worst


def run_chain(name: str, report: Callable[[dict[str, Any]], None]) -> None:
    """Run all stages; `report` gets the result so far after each."""
    result: dict[str, Any] = {"class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name], "stages": {}}
    start = time.perf_counter()
    stage = "build"
    try:
        chain = Chain(name)
        for stage in STAGES:
            result["stage"] = stage
            report(result)
            result["stages"][stage] = getattr(chain, stage)()
            result["seconds"] = round(time.perf_counter() - start, 1)
        result["stage"] = "done"
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        result |= {"stage": stage, "error": type(error).__name__, "reason": " ".join(lines)[:400]}
        result["traceback"] = traceback.format_exc()[-6000:]
        result["is_user_error"] = isinstance(error, gt.UserError)
    result["seconds"] = round(time.perf_counter() - start, 1)
    report(result)


def run_alone(name: str) -> dict[str, Any]:
    """Run the chain in a process of its own: a fork, which has torch imported already."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_chain, args=(name, sender.send))
    process.start()
    sender.close()
    result: dict[str, Any] = {"stage": "build", "stages": {}, "seconds": 0}
    deadline = time.monotonic() + TIMEOUT
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            result = receiver.recv()
        reason = f"took longer than {TIMEOUT} s"
        process.kill()
    except EOFError:
        process.join()
        reason = f"the process ended with {process.exitcode}"
    if result["stage"] != "done" and "error" not in result:
        result |= {"error": "Ended", "reason": reason, "is_user_error": False}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="run these again; by default what is missing")
    parser.add_argument("--cache", type=Path, default=Path("build/coverage.json"))
    parser.add_argument("--document", type=Path, help="write the results as Markdown here")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # also: a fork of a process with worker threads may hang
    results: dict[str, Any] = json.loads(args.cache.read_text()) if args.cache.exists() else {}
    for name in args.names or [name for name in names() if name not in results]:
        results[name] = run_alone(name)
        args.cache.parent.mkdir(parents=True, exist_ok=True)
        args.cache.write_text(json.dumps(results, indent=1))
        print(line(name, results[name]), flush=True)
    results = {name: results[name] for name in names() if name in results}
    if args.document:
        args.document.write_text(document(results))


# Failures whose reason is too short or too technical, in words.
CAUSES: dict[str, str] = {
    "blt": "its patches follow the entropy of the data; no rule shrinks its five configurations",
    "cpmant": "writes out positions as a Python list of the length at hand",
    "deepseek_v4": "compresses keys in blocks, and how many there are decides what it computes",
    "minimax": "steps through blocks of the sequence in the middle of a layer's forward",
    "phimoe": "draws its experts at random in training and takes the best in evaluation",
    "prophetnet": "slices a table of its n-gram streams by a length that must be known",
    "qwen4_exp": "its sparse attention lists the visible tokens of each query in Python",
    "qwen4_exp_text": "its sparse attention lists the visible tokens of each query in Python",
    "reformer": "takes in training only lengths that are multiples of its chunks",
    "cohere_compass_text": "the benchmark has no rotary settings for its kinds of layers",
    "dots3_note": "its three configurations constrain one another",
    "gemma4_assistant": "drafts for another model, and takes that model's states",
    "gemma4_unified_assistant": "drafts for another model, and takes that model's states",
    "xlstm": "its backend cuts the sequence into powers of two in Python",
    "musicgen": "reads several streams of audio codes; its logits are those of codes, not of text",
    "musicgen_melody": "as musicgen",
}


def document(results: Mapping[str, Any]) -> str:
    """The results as Markdown: a summary, the failures with their causes, and the table."""
    absent = {n: r for n, r in results.items() if r["stage"] in ("build", "eager")}
    tried = {n: r for n, r in results.items() if n not in absent}
    passed = [name for name, result in tried.items() if result["stage"] == "done"]
    exact = [name for name in passed if not any(tried[name]["stages"].values())]
    lines = [
        "# Which models can be captured",
        "",
        "<!-- Written by benchmarks/coverage_models.py; `make coverage-models` writes it anew. -->",
        "",
        f"Of {len(results)} architectures in the causal-LM mapping of transformers "
        f"{transformers.__version__}, {len(tried)} were built tiny and ran eagerly on a CPU; "
        f"**{len(passed)} of these ({len(passed) / max(len(tried), 1):.1%}) pass the whole "
        f"chain**, {len(exact)} of them with the same bits in logits and gradients.",
        "",
        "The chain: eager forward; capture; logits against eager at two other shapes, in training "
        "and in evaluation; gradients of all parameters against eager; LoRA of rank 2 on "
        "all linears (but those that no gradient reaches or that are narrower); training steps; "
        "the adapter saved in PEFT's layout and loaded again. A "
        "difference is in units of the largest value; 0 means the same bits.",
        "",
        "## Failures",
        "",
        *(
            f"- **{name}** ({tried[name]['stage']}): {_cause(name, tried[name])}"
            for name in tried
            if name not in passed
        ),
        "",
        "## Not tried",
        "",
        "What the rules of this benchmark do not build small, which does not say that it cannot be "
        "captured, and what does not run eagerly on such inputs:",
        "",
        *(f"- **{name}**: {_cause(name, result)}" for name, result in absent.items()),
        "",
        "## All",
        "",
        "| architecture | class | " + " | ".join(STAGES) + " | difference | seconds |",
        "|---|---|" + "---|" * (len(STAGES) + 2),
        *(_row(name, result) for name, result in results.items()),
        "",
    ]
    return "\n".join(lines)


def _cause(name: str, result: Mapping[str, Any]) -> str:
    text = CAUSES.get(name) or f"{result.get('reason', '')}"
    return " ".join(text.removeprefix("capture: ").split())


def _row(name: str, result: Mapping[str, Any]) -> str:
    marks = ["✓" if s in result["stages"] else "✗" if s == result["stage"] else "" for s in STAGES]
    worst = max(result["stages"].values(), default=0.0)
    shown = "" if len(result["stages"]) < 3 else "0" if worst == 0 else f"{worst:.0e}"
    kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    return f"| {name} | {kind} | {' | '.join(marks)} | {shown} | {result['seconds']:.0f} |"


def line(name: str, result: Mapping[str, Any]) -> str:
    worst = max(result["stages"].values(), default=0.0)
    outcome = "ok" if result["stage"] == "done" else f"FAILS at {result['stage']}:"
    reason = f"{result.get('error', '')} {result.get('reason', '')}"[:260]
    return f"{name:26} {result['seconds']:6.1f} s {worst:8.1e} {outcome} {reason}"


if __name__ == "__main__":
    main()
