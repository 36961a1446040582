"""graphtune download: fetch a model from the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from graphtune.cli.app import app


@app.command()
def download(
    id: Annotated[str, typer.Argument(metavar="ID", help="Of a model on the hub, owner/name.")],
    output_dir: Annotated[
        Path | None,
        typer.Option(help="A folder of its own; by default the hub's cache, where `train` looks."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    ignore_patterns: Annotated[
        list[str] | None, typer.Option(help="Files to leave out, such as '*.bin'; repeatable.")
    ] = None,
) -> None:
    """Download config, tokenizer and safetensors of the model ID.

    Example: graphtune download HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from huggingface_hub import snapshot_download

    from graphtune.models.loading import pretrained_options

    pretrained_options(id, revision, trust_remote_code=False)  # a clear error, and at once
    # Weights in other forms, of the same values: PyTorch's, TensorFlow's, Flax', Meta's, ONNX.
    others = ["*.bin", "*.pth", "*.h5", "*.msgpack", "original/*", "onnx/*", "*.gguf"]
    path = snapshot_download(
        id,
        revision=revision,
        local_dir=output_dir,
        ignore_patterns=ignore_patterns if ignore_patterns is not None else others,
    )
    print(path)
