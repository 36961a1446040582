"""Generation: a run, a model or a program answers prompts, and how fast it does."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from graphtune.capture import capture
from graphtune.config import ModelConfig
from graphtune.errors import UserError
from graphtune.generation import Decoder, Token, decoder_of, generate
from graphtune.generation.floor import bytes_per_token, read_bandwidth
from graphtune.models import load_tokenizer
from graphtune.passes import KVCache, Merge, Quantize
from graphtune.passes.adapters import adapter_names
from graphtune.program import Program
from graphtune.recipes import empty_model, load_run
from graphtune.training.device import pick_device
from graphtune.training.run import CONFIG
from graphtune.weights import load_weights

PREFILL = 512  # tokens of a prompt that are read at once
_STEP = 64  # lengths of caches are multiples of it, so that few are compiled


def load_speaker(
    target: str,
    *,
    base: bool = False,
    merge: bool = False,
    quantize: str | None = None,
    device: str = "auto",
) -> tuple[Program, PreTrainedTokenizerBase]:
    """The program and the tokenizer of what is to speak.

    Args:
        target: the output_dir of a run; a file that `Program.save` wrote; or a model: hub id,
            folder, .gguf file.
        base: of a run, the model as it was before training.
        merge: fold a run's adapter into the weights.
        quantize: store the weights in this format of `Quantize`.
        device: where a model or a program goes; a run's config says it.

    Raises:
        UserError: there is no such thing, or an option does not suit it.
    """
    stored = [Quantize(format=quantize)] if quantize else []  # type: ignore[arg-type]
    if (Path(target) / CONFIG).is_file():
        program, tokenizer = load_run(target, tuned=not base)
        if merge and adapter_names(program):
            program = program.apply(Merge())
        return program.apply(*stored).eval(), tokenizer
    if base or merge:
        option = "--base" if base else "--merge"
        raise UserError(f"{option} is for a training run, and {target} is none")
    where = pick_device(device)
    if Path(target).is_file() and target.endswith(".gt"):
        program = Program.load(target, device=where)
        if program.source is None:
            raise UserError(f"{target} does not say which model it is of, so has no tokenizer")
        return program.apply(*stored).eval(), load_tokenizer(program.source)
    model = empty_model(ModelConfig(id=target), where)
    program = load_weights(capture(model).apply(*stored), device=where)
    return program.eval(), load_tokenizer(target)


def cached(program: Program, tokens: int, rows: int) -> Program:
    """A program with a cache for so many rows of so many tokens, prompt and answer together.

    One that was captured with images stays without: adapters may be in its vision part, which a
    program for text has not.

    Raises:
        UserError: the model cannot have one; see `KVCache`.
    """
    if program.takes_images:
        return program.eval()
    length = -(-tokens // _STEP) * _STEP
    positions = getattr(program.config, "max_position_embeddings", None)
    if positions is not None and tokens <= positions:
        length = min(length, positions)
    prefill = min(PREFILL, length)
    return program.apply(KVCache(length, rows, prefill, logits="last")).eval()


def read_prompts(path: Path) -> list[str | list[dict[str, Any]]]:
    """The prompts of a JSON-lines file: in each line a `prompt`, or a conversation in `messages`.

    Raises:
        UserError: there is no such file, or a line has neither.
    """
    if not path.is_file():
        raise UserError(f"--file={path}: there is no such file")
    found: list[str | list[dict[str, Any]]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON: {error}") from None
        prompt = row.get("prompt", row.get("messages")) if isinstance(row, Mapping) else None
        if not isinstance(prompt, str | list):
            raise UserError(f'{path}:{number}: needs a "prompt" (text) or "messages" (a list)')
        found.append(prompt)
    if not found:
        raise UserError(f"--file={path} has no prompts")
    return found


@dataclass
class Speed:
    """How fast answers came.

    Attributes:
        tokens: that were chosen, of all rows.
        steps: of decoding, each of which reads the weights once; without those that read prompts.
        prompt_tokens: that were read.
        decode_s, prefill_s: seconds for each.
    """

    tokens: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    decode_s: float = 0.0
    prefill_s: float = 0.0

    def report(self, program: Program) -> dict[str, float]:
        """Rates, and the floor that memory sets: how often per second it can hand out all that a
        step reads. `of_floor` is 1 where decoding is as fast as that."""
        rate = self.steps / self.decode_s if self.decode_s else 0.0
        bandwidth = read_bandwidth(next(program.parameters()).device)
        floor = bandwidth / bytes_per_token(program)
        return {
            "prefill_tokens_per_s": self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0,
            "decode_tokens_per_s": rate * self.tokens / max(self.steps, 1),
            "steps_per_s": rate,
            "floor_steps_per_s": floor,
            "of_floor": rate / floor,
            "bytes_per_step": bytes_per_token(program),
            "read_bytes_per_s": bandwidth,
        }


def timed(
    decoder: Decoder, prompts: Sequence[Sequence[int]], speed: Speed, **options: Any
) -> Iterator[Token]:
    """`generate`, adding to `speed` what it takes."""
    last, steps = time.perf_counter(), 0
    row = len(prompts)
    for token in generate(decoder, prompts, **options):
        if token.row <= row:  # the first of a step
            now = time.perf_counter()
            if steps == 0:
                speed.prefill_s += now - last
            else:
                speed.decode_s += now - last
                speed.steps += 1
            last, steps = now, steps + 1
        row = token.row
        speed.tokens += steps > 1
        yield token
    speed.prompt_tokens += sum(map(len, prompts))


def warm_up(program: Program, *, compile: bool) -> Decoder:
    """A decoder that has read a prompt and a token, so that all is compiled."""
    decoder = decoder_of(program, compile=compile)
    if compile:
        decoder.start([[0, 0]], 2)
        decoder.step([0])
    return decoder
