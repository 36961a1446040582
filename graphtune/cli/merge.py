"""graphtune merge: fold an adapter into the model that it was trained on."""

from pathlib import Path
from typing import Annotated

import typer

from graphtune.cli.app import app


@app.command()
def merge(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="A training run, or a PEFT adapter.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the merged model; must be empty.")
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The adapter's base model; by default the one that its config names."),
    ] = None,
) -> None:
    """Merge an adapter into its base model, and save that in Hugging Face's layout.

    Example: graphtune merge runs/quickstart -o merged
    """
    import json  # torch is slow to import, and --help should not be

    import graphtune as gt
    from graphtune.errors import UserError
    from graphtune.export.peft import CONFIG, from_peft
    from graphtune.models import load_tokenizer
    from graphtune.passes import Merge
    from graphtune.passes.adapters import adapter_names
    from graphtune.recipes import load_run

    if not (source / CONFIG).is_file():
        if base is not None:
            raise UserError(f"--base goes with an adapter; the run {source} knows its own")
        program, tokenizer = load_run(source, quantized=False)
    else:
        id = base or json.loads((source / CONFIG).read_text()).get("base_model_name_or_path")
        if not id:
            raise UserError(f"{source / CONFIG} names no base model: say which with --base")
        tokenizer = load_tokenizer(id)
        program = from_peft(gt.capture(gt.load_model(id)), source)
    if not adapter_names(program):
        raise UserError(f"{source} has no adapter to merge: it trained the model's own weights")
    print(f"saved {gt.export.to_hf(program.apply(Merge()), output, tokenizer=tokenizer)}")
