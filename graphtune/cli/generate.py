"""graphtune generate: answer a prompt with what a run trained."""

from typing import Annotated

import typer

from graphtune.cli.app import app

Run = Annotated[str, typer.Argument(metavar="RUN", help="The output_dir of a training run.")]


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Answer as the model did before training.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the likeliest token; above: draw one.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
) -> None:
    """Answer PROMPT with the model that RUN trained, in its chat template.

    Example: graphtune generate runs/quickstart "What does `math.hypot` do?"
    """
    from graphtune.recipes import load_run  # torch is slow to import, and --help should not be
    from graphtune.recipes.generate import encode_chat, stop_ids
    from graphtune.recipes.generate import generate as draw

    program, tokenizer = load_run(run, tuned=not base)
    ids: list[int] = []
    shown = ""
    for token in draw(
        program,
        encode_chat(tokenizer, prompt, system),
        stop=stop_ids(program, tokenizer),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    ):
        ids.append(token)
        # The whole answer is decoded each time: one token may be part of a character.
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
