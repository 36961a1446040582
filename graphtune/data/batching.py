"""Which examples share a batch: a function of their lengths, the options, seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from graphtune.data.packing import Fit, Indices, Pack, check_lengths, pack
from graphtune.errors import UserError

Mode = Literal["padded", "packed", "bucketed", "padding_free"]

_GRAIN = 8  # lengths that are chosen are multiples of it, which matrix units like
_CANDIDATES = 512  # lengths to choose from, at most


@dataclass(frozen=True)
class Batching:
    """How examples are laid out in batches, and in how many distinct shapes.

    A compiled step is compiled once for each shape, so there are few; with pairs of a chosen
    and a rejected answer, the modes that lay one example in a row have twice as many rows.

    Attributes:
        mode: `padded`: one example in a row of `length`; one shape, (batch_size, length).
            `packed`: as many examples in a row of `length` as fit; one shape, the same.
            `bucketed`: one example in a row, beside others of similar length; at most `shapes`
            shapes, (batch_size, size), with the sizes that leave least padding.
            `padding_free`: `batch_size` examples in one row; at most `shapes` shapes,
            (1, size), with the sizes that leave least padding.
        batch_size: rows in a batch; with `padding_free`, examples in it.
        length: tokens in a row, or in an example with `padding_free`, at most.
        shapes: how many distinct shapes there may be.
        fit: how rows are packed; see `pack`.
        shuffle: a new order in each epoch; else that of the data set.
        seed: with the epoch, it decides the order; 0 or more.
        window: of a stream, how many examples are shuffled and laid out together.
    """

    mode: Mode = "packed"
    batch_size: int = 4
    length: int = 2048
    shapes: int = 4
    fit: Fit = "best"
    shuffle: bool = True
    seed: int = 0
    window: int = 2048

    def __post_init__(self) -> None:
        for name, options in (("mode", get_args(Mode)), ("fit", get_args(Fit))):
            if getattr(self, name) not in options:
                raise UserError(
                    f"loader.{name}: {getattr(self, name)!r} is none of {', '.join(options)}"
                )
        for name, least in (
            ("batch_size", 1),
            ("length", 2),
            ("shapes", 1),
            ("seed", 0),
            ("window", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"loader.{name}: {getattr(self, name)} must be {least} or more")

    @property
    def one_per_row(self) -> bool:
        """Whether each document has a row to itself."""
        return self.mode in ("padded", "bucketed")


class PlannedBatch(NamedTuple):
    """One batch before it is collated.

    rows: the examples of each row, int64 indices.
    height: how many rows the batch has; those that `rows` lacks are padding.
    length: tokens per row.
    """

    rows: list[Indices]
    height: int
    length: int


@dataclass(frozen=True, eq=False)
class Plan(Sequence[PlannedBatch]):
    """The batches of an epoch, kept as arrays: a million examples take a few megabytes.

    Attributes:
        pack: the rows, in the order in which they are used.
        starts: int64 (batches + 1,): batch b has the rows from `starts[b]` to `starts[b + 1]`.
        lengths: int64 (batches,), tokens per row.
        height: rows in each batch, with those of padding.
        tokens: tokens that are not padding.
        slots: tokens that are computed.
    """

    pack: Pack
    starts: Indices
    lengths: Indices
    height: int
    tokens: int
    slots: int

    @property
    def efficiency(self) -> float:
        """The share of what is computed that is not padding."""
        return self.tokens / self.slots if self.slots else 1.0

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """The distinct (rows, length) that occur."""
        return {(self.height, length) for length in self.lengths.tolist()}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> PlannedBatch:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        bounds = self.pack.offsets[self.starts[index] : self.starts[index + 1] + 1]
        documents = self.pack.documents
        rows = [documents[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        return PlannedBatch(rows, self.height, int(self.lengths[index]))

    def __iter__(self) -> Iterator[PlannedBatch]:
        return (self[index] for index in range(len(self)))


def plan(
    lengths: Sequence[int] | NDArray[Any],
    options: Batching,
    epoch: int = 0,
    sizes: Indices | None = None,
) -> Plan:
    """The batches of one epoch: every example once, the same wherever and whenever it is called.

    How many batches there are is the same for every epoch.

    Args:
        lengths: tokens of each example, (examples,); or of the chosen and the rejected answer,
            (examples, 2), which a row holds one after the other, or two rows beside each other.
        options: see `Batching`.
        epoch: with `options.seed`, it decides the order.
        sizes: `row_lengths(lengths, options)`, if already known.

    Raises:
        UserError: an example is longer than `options.length`, or empty.
    """
    parts = np.asarray(lengths, dtype=np.int64)
    tokens = entry_lengths(parts, options)
    check_lengths(tokens, options.length)
    if sizes is None:
        sizes = row_lengths(parts, options)
    size = options.batch_size
    order = _order(len(tokens), options, epoch)
    rows = Pack(order, np.arange(len(order) + 1))
    if options.mode == "padded":
        batch_of = np.arange(len(order)) // size
    elif options.mode == "packed":
        found = pack(tokens[order], options.length, options.fit)
        rows = Pack(order[found.documents], found.offsets)
        batch_of = _order(len(rows.offsets) - 1, options, epoch, stream=1) // size
    elif options.mode == "bucketed":
        batch_of, bucket_of = _bucket(np.searchsorted(sizes, tokens[order]), size)
        shuffled = _order(len(bucket_of), options, epoch, stream=1)
        batch_of = np.argsort(shuffled)[batch_of]
    else:
        rows = Pack(order, np.append(np.arange(0, len(order), size), len(order)))
        batch_of = np.arange(len(rows.offsets) - 1)
        totals = np.diff(np.append(0, np.cumsum(tokens[order]))[rows.offsets])
    starts = np.append(0, np.cumsum(np.bincount(batch_of)))
    if options.mode == "bucketed":
        widths = sizes[bucket_of[shuffled]]
    elif options.mode == "padding_free":
        widths = sizes[np.searchsorted(sizes, totals)]
    else:
        widths = np.full(len(starts) - 1, options.length)
    height = 1 if options.mode == "padding_free" else size
    beside = parts.shape[1] if parts.ndim == 2 and options.one_per_row else 1
    return Plan(
        pack=_in_order(rows, batch_of),
        starts=starts,
        lengths=widths,
        height=height,
        tokens=int(parts.sum()),
        slots=height * beside * int(widths.sum()),
    )


def entry_lengths(parts: NDArray[Any], options: Batching) -> Indices:
    """What each example takes of a row, (examples,): of a pair its two answers together, or the
    longer one where each has a row to itself."""
    if parts.ndim == 1:
        return parts
    return parts.max(axis=1) if options.one_per_row else parts.sum(axis=1)


def row_lengths(lengths: Sequence[int] | NDArray[Any], options: Batching) -> Indices:
    """The row lengths that batches may have, int64, ascending; the same for every epoch.

    Those of `bucketed` and `padding_free` are the `options.shapes` multiples of 8 that leave
    the least padding (by dynamic programming); of `padding_free` over the totals of batches that
    a few epochs have, and one for whatever other epochs may bring.
    """
    if options.mode in ("padded", "packed"):
        return np.array([options.length])
    tokens = entry_lengths(np.asarray(lengths, dtype=np.int64), options)
    if not len(tokens):
        return even_lengths(options)
    if options.mode == "bucketed":
        return _least_padding(tokens, int(tokens.max()), options.length, options.shapes)
    groups = np.arange(0, len(tokens), options.batch_size)
    totals = [np.add.reduceat(tokens[_order(len(tokens), options, e)], groups) for e in range(4)]
    largest = int(np.sort(tokens)[-options.batch_size :].sum())
    limit = options.length * options.batch_size
    return _least_padding(np.concatenate(totals), largest, limit, options.shapes)


def even_lengths(options: Batching) -> Indices:
    """Row lengths for a stream, whose lengths nobody knows: evenly apart."""
    longest = options.length
    if options.mode in ("padded", "packed"):
        return np.array([longest])
    if options.mode == "padding_free":
        longest *= options.batch_size
    steps = np.arange(1, options.shapes + 1) * longest / options.shapes
    return np.unique(np.minimum(np.ceil(steps / _GRAIN).astype(np.int64) * _GRAIN, longest))


def _least_padding(tokens: Indices, largest: int, limit: int, shapes: int) -> Indices:
    """At most `shapes` lengths, the last from `largest` to `limit`, that pad `tokens` least when
    each goes to the next one above it."""
    grain = _GRAIN * max(1, -(-largest // (_GRAIN * _CANDIDATES)))
    steps = np.append(-(-tokens // grain), -(-largest // grain))
    candidates, weight = np.unique(steps, return_counts=True)
    ends = np.concatenate([[0], candidates]).astype(np.float64)
    below = np.concatenate([[0], np.cumsum(weight)]).astype(np.float64)
    # cost[a, b]: slots of the tokens between candidates a and b if b is their length
    cost = np.where(np.tri(len(ends), k=-1, dtype=bool), np.inf, ends * (below - below[:, None]))
    best = cost[0]
    choices = []
    for _ in range(min(shapes, len(candidates)) - 1):
        total = best[:, None] + cost
        choices.append(total.argmin(axis=0))
        best = total.min(axis=0)
    last = len(ends) - 1
    chosen = [last]
    for choice in reversed(choices):
        chosen.append(choice[chosen[-1]])
    found = np.unique(ends[[one for one in chosen if one]]).astype(np.int64) * grain
    return np.unique(np.minimum(found, limit))


def _bucket(bucket: Indices, size: int) -> tuple[Indices, Indices]:
    """Rows into batches of `size`, those of each bucket apart.

    Returns:
        The batch of each row, and the bucket of each batch.
    """
    rows = np.bincount(bucket)
    batches = -(-rows // size)
    within = np.empty_like(bucket)  # how many rows of its bucket come before a row
    within[np.argsort(bucket, kind="stable")] = np.arange(len(bucket)) - np.repeat(
        np.cumsum(rows) - rows, rows
    )
    first = np.cumsum(batches) - batches
    return first[bucket] + within // size, np.repeat(np.arange(len(rows)), batches)


def _in_order(rows: Pack, batch_of: Indices) -> Pack:
    """Rows sorted by batch; those of a batch in their order."""
    order = np.argsort(batch_of, kind="stable")
    counts = np.diff(rows.offsets)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    documents = rows.documents[np.argsort(np.repeat(place, counts), kind="stable")]
    return Pack(documents, np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int64))


def _order(count: int, options: Batching, epoch: int, stream: int = 0) -> Indices:
    """A permutation. Raw bits are used, as numpy promises to keep them from version to version."""
    if not options.shuffle:
        return np.arange(count)
    bits = np.random.PCG64([options.seed, epoch, stream]).random_raw(count)
    return np.argsort(bits, kind="stable")
