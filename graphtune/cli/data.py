"""graphtune data: what a config's data set trains on."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphtune.cli.app import OVERRIDES, Config, Overrides, app

if TYPE_CHECKING:
    from rich.console import Console

    from graphtune.config import SFTConfig
    from graphtune.data import Dataset
    from graphtune.recipes.reading import Data

_STREAMED = 1000  # examples of a stream that are looked at
_COUNTED = 2000  # examples whose labels are counted
_BINS = 12  # lines of the histogram, at most
_REPEATED = re.compile(r"(<[^<>\s]+>|\[[A-Z_]+\])\1{3,}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but for newlines and tabs


@app.command(context_settings=OVERRIDES)
def data(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, help="How many examples to show.")] = 10,
    seed: Annotated[int, typer.Option(help="Chooses the examples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers for a machine.")] = False,
) -> None:
    """Show what CONFIG trains on: examples with what is learned marked, lengths, padding.

    The data set is made as training makes it; no model is loaded. What is learned is coloured,
    or in brackets where there are no colours.

    Example: graphtune data configs/quickstart.yaml --samples 3
    """
    from rich.console import Console  # torch is slow to import, and --help should not be

    from graphtune.config import load_config, validate
    from graphtune.models import load_processor
    from graphtune.recipes import origin
    from graphtune.recipes.job import batching
    from graphtune.recipes.reading import read_data

    settings: SFTConfig = validate(load_config(config, overrides or ()))
    tokenizer = load_processor(settings.model.id, **origin(settings.model))
    dataset, streamed = _beginning(read_data(settings.dataset, tokenizer, settings))
    options = settings.loader
    rows = 1 if options.batch_size == "auto" else options.batch_size
    layout = batching(options, rows, settings.seed, shuffle=options.shuffle)
    figures = summarize(dataset, layout, seed) | streamed
    if as_json:
        print(json.dumps(figures))
        return
    console = Console(highlight=False)
    chosen = random.Random(seed).sample(range(len(dataset)), min(samples, len(dataset)))
    for index in sorted(chosen):
        _show_example(console, index, dataset[index], tokenizer)
    _show_lengths(console, figures["lengths"]["histogram"])
    _show_figures(console, figures)


def _beginning(dataset: Data) -> tuple[Dataset, dict[str, Any]]:
    """The data set, of a stream its beginning; and figures that only the stream has."""
    from graphtune.data import Dataset

    if isinstance(dataset, Dataset):
        return dataset, {}
    beginning = Dataset.build(islice(dataset, _STREAMED), max_length=None)
    counts = {name: getattr(dataset, name) for name in ("truncated", "dropped", "skipped")}
    return beginning, {"streamed": True} | counts


def summarize(dataset: Dataset, batching: Any, seed: int = 0) -> dict[str, Any]:
    """Figures about a data set and the batches of its first epoch.

    Returns:
        examples: how many; skipped: bad rows left out; dropped: examples left out, as nothing
        to learn was left of them; truncated: examples cut to `max_length`.
        tokens: of all examples; learned: the share of them that has labels, of 2000 examples
        if there are more.
        lengths: tokens of an example: least, mean, median, p95, most, and a histogram of
        [first, last, examples].
        batches: per epoch; shapes: the distinct [rows, tokens] among them; padding: the share
        of computed tokens that is padding.
    """
    import numpy as np

    from graphtune.data.batching import plan

    lengths = np.asarray(dataset.lengths)
    sizes = lengths if lengths.ndim == 1 else lengths.sum(axis=1)  # of a pair, both answers
    layout = plan(lengths, batching)
    return {
        "examples": len(dataset),
        "skipped": int(dataset.skipped),
        "dropped": int(dataset.dropped),
        "truncated": int(dataset.truncated),
        "tokens": int(sizes.sum()),
        "learned": _learned_share(dataset, seed),
        "lengths": {
            "least": int(sizes.min()),
            "mean": float(sizes.mean()),
            "median": float(np.median(sizes)),
            "p95": float(np.percentile(sizes, 95)),
            "most": int(sizes.max()),
            "histogram": _histogram(sizes),
        },
        "batches": len(layout),
        "shapes": sorted([rows, length] for rows, length in layout.shapes),
        "padding": 1 - layout.efficiency,
    }


def _histogram(sizes: Any) -> list[list[int]]:
    """[first, last, count] of ranges of equal width, a power of two."""
    import numpy as np

    least, most = int(sizes.min()), int(sizes.max())
    width = 1
    while most // width - least // width >= _BINS:
        width *= 2
    first = least // width
    counts = np.bincount(sizes // width - first)
    return [
        [(first + i) * width, (first + i + 1) * width - 1, int(count)]
        for i, count in enumerate(counts)
    ]


def _learned_share(dataset: Dataset, seed: int) -> float:
    from graphtune.data import IGNORE_INDEX

    indices: Sequence[int] = range(len(dataset))
    if len(indices) > _COUNTED:
        indices = sorted(random.Random(seed).sample(indices, _COUNTED))
    learned = tokens = 0
    for index in indices:
        for _, _, labels in _sequences(dataset[index]):
            tokens += len(labels)
            learned += sum(label != IGNORE_INDEX for label in labels)
    return learned / tokens


def _sequences(example: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[int], Sequence[int]]]:
    """Name, ids and labels of each sequence of an example: a pair has two of them."""
    from graphtune.data import IGNORE_INDEX

    if "chosen" in example:
        for name in ("chosen", "rejected"):
            yield name, example[name]["input_ids"], example[name]["labels"]
    elif "prompt_ids" in example:
        ids = example["prompt_ids"]
        yield "prompt", ids, [IGNORE_INDEX] * len(ids)
    else:
        yield "", example["input_ids"], example["labels"]


def _show_example(console: Console, index: int, example: Mapping[str, Any], tokenizer: Any) -> None:
    from rich.text import Text

    from graphtune.data import IGNORE_INDEX

    plain = console.color_system is None or console.no_color
    opening, closing = ("", "") if not plain else _brackets()
    for name, ids, labels in _sequences(example):
        learned = sum(label != IGNORE_INDEX for label in labels)
        title = f"example {index}" + (f", {name}" if name else "")
        console.rule(f"{title}: {len(ids)} tokens, {learned} learned", align="left", style="dim")
        text = Text()
        for piece, is_learned in pieces(tokenizer, ids, labels):
            if is_learned:
                text.append(f"{opening}{piece}{closing}", style="bold green")
            else:
                text.append(piece, style="" if plain else "dim")
        console.print(text, soft_wrap=True)
    console.print()


def pieces(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> Iterator[tuple[str, bool]]:
    """The text of each run of tokens that are learned, or are not.

    A placeholder that comes many times in a row, as an image's does, is there once with its
    number, and control characters are escaped.
    """
    from graphtune.data import IGNORE_INDEX

    decode = getattr(tokenizer, "tokenizer", tokenizer).decode  # of a processor, its tokenizer
    pairs = zip(map(int, ids), (label != IGNORE_INDEX for label in labels), strict=True)
    before: list[int] = []
    for is_learned, pairs_of_run in groupby(pairs, key=lambda pair: pair[1]):
        run = [token for token, _ in pairs_of_run]
        text = _REPEATED.sub(_once, _continued(decode, before, run))
        yield _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text), is_learned
        before = run[-8:]


def _once(found: re.Match[str]) -> str:
    return f"{found[1]}(x{len(found[0]) // len(found[1])})"


def _continued(decode: Any, before: list[int], ids: list[int]) -> str:
    """What `ids` add to the text of `before`; by themselves some lose the space in front."""
    head, whole = decode(before), decode([*before, *ids])
    return whole[len(head) :] if whole.startswith(head) else decode(ids)


def _brackets() -> tuple[str, str]:
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        "⟦⟧".encode(encoding)
    except UnicodeEncodeError:
        return "[[", "]]"
    return "⟦", "⟧"


def _show_lengths(console: Console, histogram: Sequence[Sequence[int]]) -> None:
    from rich.bar import Bar
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(width=40)
    table.add_row("tokens", "examples", "", style="bold")
    most = max(count for _, _, count in histogram)
    for first, last, count in histogram:
        span = str(first) if first == last else f"{first}-{last}"
        table.add_row(span, f"{count:,}", Bar(most, 0, count, width=40))
    console.print(table)
    console.print()


def _show_figures(console: Console, figures: Mapping[str, Any]) -> None:
    lengths = figures["lengths"]
    kept = f"{figures['examples']:,} examples"
    if figures.get("streamed"):
        kept = f"the first {kept} of a stream"
    shapes = ", ".join(f"{rows} x {length}" for rows, length in figures["shapes"])
    console.print(f"{kept}, {figures['tokens']:,} tokens, {figures['learned']:.1%} of them learned")
    console.print(
        f"{lengths['least']} to {lengths['most']} tokens, mean {lengths['mean']:.0f}, "
        f"median {lengths['median']:.0f}, 95 % have at most {lengths['p95']:.0f}"
    )
    console.print(
        f"{figures['truncated']:,} truncated, {figures['dropped']:,} dropped, "
        f"{figures['skipped']:,} bad rows skipped"
    )
    noun = "shape" if len(figures["shapes"]) == 1 else "shapes"
    console.print(
        f"{figures['batches']:,} batches in {len(figures['shapes'])} {noun} ({shapes}), "
        f"{figures['padding']:.1%} padding"
    )
