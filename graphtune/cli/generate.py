"""graphtune generate: answer prompts with a run, a model or a program."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphtune.cli.app import app, note

if TYPE_CHECKING:
    from graphtune.generation import Token

Run = Annotated[str, typer.Argument(metavar="RUN", help="The output_dir of a training run.")]
Speaker = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL",
        help="The output_dir of a training run; a .gt file; or a hub id, folder or .gguf file.",
    ),
]
_Ask = Callable[[list[list[int]], int], Iterator["Token"]]


@app.command()
def generate(
    target: Speaker,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What the user says.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="The same; may be given several times.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help='Prompts from JSON lines, each with a "prompt" or "messages".'),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk: a turn per line of input.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on with the text itself, without a chat template.")
    ] = False,
    base: Annotated[
        bool, typer.Option("--base", help="Answer as a run's model did before training.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold a run's adapter into the weights first.")
    ] = False,
    quantize: Annotated[
        str | None, typer.Option(help="Keep weights in few bits: nf4, int8 or int4.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the likeliest token; above: draw one.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest of this probability in all.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from those so likely, relative to the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: what was said is less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends an answer; several times.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="How many prompts at once.")] = 1,
    length: Annotated[
        int | None, typer.Option(help="Positions of the cache; by default what is needed.")
    ] = None,
    cache: Annotated[bool, typer.Option(help="Keep keys and values of earlier tokens.")] = True,
    compile: Annotated[
        bool, typer.Option(help="Compile first: for long answers, and many of them.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object: answers, and how fast they came.")
    ] = False,
) -> None:
    """Answer prompts, in the model's chat template if it has one.

    Answers go to stdout as they come; how fast, and how that compares to what the memory's
    bandwidth allows, to stderr.

    Example: graphtune generate runs/quickstart "What does `math.hypot` do?" --temperature 0.7
    """
    from graphtune.errors import UserError  # torch is slow to import, and --help should not be
    from graphtune.generation import Sampling, encode_chat, encode_messages, stop_ids
    from graphtune.recipes.generate import Speed, cached, load_speaker, read_prompts, timed, warm_up

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    asked: list[Any] = [*(words or []), *(prompt or []), *(read_prompts(file) if file else [])]
    if chat == bool(asked):
        raise UserError("give prompts (as words, with --prompt or --file), or --chat, not both")
    if chat and as_json:
        raise UserError("--json is for prompts, and --chat asks for them one by one")
    program, tokenizer = load_speaker(target, base=base, merge=merge, quantize=quantize)
    stops, speed = stop_ids(program, tokenizer), Speed()
    decoders: dict[int, Any] = {}

    def encode(one: Any) -> list[int]:
        if isinstance(one, list):
            return encode_messages(tokenizer, one)
        if raw:
            return tokenizer.encode(one)
        return encode_chat(tokenizer, one, system)

    def decoder(rows: int, tokens: int) -> Any:
        if rows not in decoders:
            speaker = program
            if cache:
                try:
                    speaker = cached(program, length or tokens, rows)
                except UserError as error:
                    if "without a cache" not in str(error):
                        raise
                    note(f"{error}; so does this")
            decoders[rows] = warm_up(speaker, compile=compile and not speaker.takes_mask)
        return decoders[rows]

    def ask(ids: list[list[int]], tokens: int) -> Iterator[Token]:
        return timed(
            decoder(len(ids), tokens),
            ids,
            speed,
            stop_ids=stops,
            stop_strings=tuple(stop or ()),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            tokenizer=tokenizer,
        )

    if chat:
        positions = getattr(program.config, "max_position_embeddings", None) or 4096
        _chat(encode, ask, system, length or min(4096, positions))
        return
    ids = [encode(one) for one in asked]
    longest = max(map(len, ids)) + max_new_tokens
    answers: list[dict[str, Any]] = []
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        texts, ends = [""] * len(part), [""] * len(part)
        counts = [0] * len(part)
        streaming = len(part) == 1 and not as_json
        for token in ask(part, longest):
            texts[token.row] += token.text
            counts[token.row] += token.id is not None
            ends[token.row] = token.end or ""
            if streaming:
                print(token.text, end="", flush=True)
        if streaming:
            print()
        elif not as_json:
            print(*texts, sep="\n")
        for one, text, end, count in zip(asked[start:], texts, ends, counts, strict=False):
            answers.append({"prompt": one, "answer": text, "end": end, "tokens": count})
    figures = speed.report(next(iter(decoders.values())).program)
    if as_json:
        print(json.dumps({"answers": answers, "speed": figures}, ensure_ascii=False))
    elif speed.steps:
        note(
            f"{figures['decode_tokens_per_s']:.1f} tokens/s; {figures['of_floor']:.0%} of what "
            f"reading {figures['bytes_per_step'] / 1e6:,.0f} MB per step at "
            f"{figures['read_bytes_per_s'] / 1e9:.1f} GB/s allows"
        )


def _chat(encode: Callable[[Any], list[int]], ask: _Ask, system: str | None, length: int) -> None:
    """Turns from the terminal or a pipe, until its end."""
    import sys

    from rich.console import Console

    from graphtune.errors import UserError

    console = Console(highlight=False, soft_wrap=True)
    start = [{"role": "system", "content": system}] if system else []
    said = list(start)
    if sys.stdin.isatty():
        console.print("[dim]/new begins anew, /exit or Ctrl-D ends[/dim]")
    while True:
        try:
            line = console.input("[bold]> [/bold]" if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/new":
            said = list(start)
        if not line or line == "/new":
            continue
        said.append({"role": "user", "content": line})
        answer = ""
        try:
            for token in ask([encode(said)], length):
                console.print(token.text, end="", markup=False)
                answer += token.text
            console.print()
            said.append({"role": "assistant", "content": answer})
        except UserError as error:
            note(f"{error}; /new begins anew")
            said.pop()
