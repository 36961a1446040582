"""graphtune export: ship what a run trained."""

from pathlib import Path
from typing import Annotated, Any

import typer

from graphtune.cli.app import app, note
from graphtune.cli.generate import Run


@app.command()
def export(
    run: Run,
    to: Annotated[
        str,
        typer.Option(
            metavar="NAME[:FORMAT][,NAME...]",
            help="hf: merged safetensors; peft: the adapter; torchao[:int8|int4]: quantized, for "
            "transformers; gguf[:f32|f16|bf16|q8_0]: for llama.cpp; onnx: for onnxruntime; pt2: "
            "for torch.export.load; aoti: compiled by AOTInductor; executorch: a .pte for devices.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder, or the folder of the folders of several; by default RUN/NAME.",
        ),
    ] = None,
    max_seq_len: Annotated[
        int, typer.Option(min=2, help="executorch: most tokens of a text, prompt and answer.")
    ] = 512,
    prefill: Annotated[
        int | None,
        typer.Option(min=2, help="executorch: most tokens in one call; 128, if not shorter."),
    ] = None,
    kv_cache: Annotated[
        bool, typer.Option(help="executorch: keep keys and values from call to call.")
    ] = True,
    backend: Annotated[
        str, typer.Option(help="executorch: xnnpack, portable, vulkan, coreml, mps or qnn.")
    ] = "xnnpack",
    split_weights: Annotated[
        bool, typer.Option("--ptd", help="executorch: weights in a file of their own, model.ptd.")
    ] = False,
    adapter_file: Annotated[
        bool,
        typer.Option(
            "--adapter-file",
            help="executorch: the adapter in a file of its own, adapter.ptd, not merged.",
        ),
    ] = False,
    custom_sdpa: Annotated[
        bool,
        typer.Option(
            "--custom-sdpa",
            help="executorch: attention by the kernels of its custom_ops library.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export that lies there.")
    ] = False,
) -> None:
    """Export the model that RUN trained, its adapter merged where the target has none.

    Each export is run and compared with the program before it takes its place, beside a
    manifest.json of hashes, versions and checks.

    Example: graphtune export runs/quickstart --to executorch,gguf:q8_0
    """
    wanted = _targets(to)
    import graphtune.export as targets  # torch is slow to import, and --help should not be
    from graphtune.export.artifact import read_checks
    from graphtune.export.packages import require
    from graphtune.passes import Convert, Merge
    from graphtune.passes.adapters import adapter_names
    from graphtune.recipes import check_begun, load_run

    for name in wanted:
        require(name)
    if "executorch" in wanted:
        from graphtune.export.executorch_backends import partitioners

        partitioners(backend)  # before anything is loaded
        check_begun(run)
    for name, format in wanted.items():
        folder = Path(run) / name
        if output is not None:
            folder = output / name if len(wanted) > 1 else output
        # Integers go to devices; other formats hold what was trained, in full precision.
        program, tokenizer = load_run(
            run, quantized=False, aware=name == "executorch", images=name in ("hf", "peft")
        )
        applied, adapters = {row.name for row in program.ledger}, adapter_names(program)
        if "qat" in applied and "convert" not in applied:
            program = program.apply(Convert())
        elif adapters and "qat" not in applied and not _apart(name, adapter_file):
            note(f"merged the adapter {', '.join(adapters)} into the weights")
            program = program.apply(Merge())
        options: dict[str, Any] = {"overwrite": overwrite, "run": str(run)}
        if format is not None:
            options["format"] = format
        if name == "peft":
            targets.to_peft(program, folder, **options)
        elif name == "executorch":
            options |= {"tokenizer": tokenizer, "max_seq_len": max_seq_len, "prefill": prefill}
            options |= {"kv_cache": kv_cache, "backend": backend, "split_weights": split_weights}
            options |= {"adapter_file": adapter_file, "custom_sdpa": custom_sdpa}
            _tell(targets.to_executorch(program, folder, **options))
        else:
            getattr(targets, f"to_{name}")(program, folder, tokenizer=tokenizer, **options)
        for check in read_checks(folder):
            print(check)
        print(f"saved {folder}")


def _apart(target: str, adapter_file: bool) -> bool:
    """Whether a target has the adapter in a file of its own."""
    return target == "peft" or (target == "executorch" and adapter_file)


def _targets(to: str) -> dict[str, str | None]:
    """The targets of `--to` and their formats, in order."""
    from graphtune.config import did_you_mean
    from graphtune.errors import UserError
    from graphtune.export import TARGETS

    wanted: dict[str, str | None] = {}
    for one in to.split(","):
        name, _, format = one.strip().partition(":")
        if name not in TARGETS:
            raise UserError(f"--to={one}: there is no target {name!r}{did_you_mean(name, TARGETS)}")
        if name in wanted:
            raise UserError(f"--to={to}: {name} is named twice; export it once, then with -o again")
        if format and name not in ("torchao", "gguf"):
            raise UserError(f"--to={one}: {name} has no formats; give {name} alone")
        wanted[name] = format or None
    return wanted


def _tell(report: Any) -> None:
    """What an `ExecutorchReport` says besides its check."""
    from graphtune.export.device_tokenizer import describe_parity

    done, left = report.delegated_nodes, report.undelegated_nodes
    print(f"lowered in {report.lowering_s:.0f} s, {report.size_bytes / 1e6:.0f} MB")
    print(
        f"{report.backend} runs {done} of {done + left} operators, in {report.delegates} delegates"
    )
    if report.load_s is None:
        note(f"not run: the ExecuTorch runtime that is installed here has no {report.backend}")
    else:
        decode = report.decode_tokens_per_s
        print(
            f"loads in {report.load_s:.1f} s, prefill {report.prefill_tokens_per_s:.0f} tokens/s"
            + (f", decode {decode:.1f} tokens/s" if decode else "")
            + " in the ExecuTorch runtime"
        )
    if report.greedy_tokens:
        gap = report.greedy_gap
        print(
            f"{report.greedy_equal} of {report.greedy_tokens} greedy tokens are the program's"
            + (f"; others are at most {gap:.2g} of a logit behind" if gap else "")
        )
    if report.tokenizer is not None:
        print(describe_parity(dict(report.tokenizer)))
