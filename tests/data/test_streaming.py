"""A resumed stream goes on as the uninterrupted one does."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphtune.data.dataset import IGNORE_INDEX
from graphtune.data.fields import BadRow
from graphtune.data.mixture import mix
from graphtune.data.rows import PLACE, Rows, read_rows
from graphtune.data.streaming import RowStream, StreamingDataset
from graphtune.errors import UserError

BAD, EMPTY, LONG = 7, 11, 13  # every so many rows


def encode(row: Mapping[str, Any]) -> dict[str, Any]:
    number = row["number"]
    if number % BAD == BAD - 1:
        raise BadRow("number", "is bad")
    tokens = [number, number] + [0] * (number % LONG == LONG - 1)
    labels = [IGNORE_INDEX, IGNORE_INDEX if number % EMPTY == EMPTY - 1 else number]
    return {"input_ids": tokens, "labels": labels + [0] * (len(tokens) - 2)}


def survives(number: int) -> bool:
    return number % BAD != BAD - 1 and number % EMPTY != EMPTY - 1


def rows_of(shard: Sequence[int]) -> Iterator[dict[str, int]]:
    for start in shard:
        for number in range(start, start + 10):
            yield {"number": number}


@cache
def hub_stream(shards: int) -> datasets.IterableDataset:
    """Rows 0, 1, ... as `load_dataset(..., streaming=True)` gives them, ten in a file."""
    starts = [10 * shard for shard in range(shards)]
    return datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"shard": starts})


def stream(size: int, kind: str = "list", **options: Any) -> RowStream:
    data: Any = [{"number": number} for number in range(size)]
    if kind == "hub":
        data = hub_stream(size // 10)
    if kind == "arrow":
        data = datasets.Dataset.from_list(data).to_iterable_dataset(num_shards=3)
    return RowStream(
        Rows(data, None, on_bad_row=options.pop("on_bad_row", "skip")),
        encode,
        max_length=2,
        **options,
    )


def numbers(examples: Iterator[Any] | StreamingDataset) -> list[int]:
    return [int(example["input_ids"][0]) for example in examples]


def saved(source: StreamingDataset) -> Any:
    """The state as a checkpoint would hold it."""
    return json.loads(json.dumps(source.state_dict()))


SETUPS = {
    "list": lambda: stream(40),
    "generated": lambda: stream(40, "hub"),
    "table": lambda: stream(40, "arrow"),
    "first": lambda: mix([stream(40), stream(30, "hub")], [0.7, 0.3], seed=3),
    "all": lambda: mix([stream(30, "hub"), stream(8)], [1, 1], until="all_exhausted"),
    "count": lambda: mix([stream(30, "hub"), stream(8)], [1, 1], until=37),
}


@settings(deadline=None, max_examples=60)
@given(
    setup=st.sampled_from(sorted(SETUPS)),
    cuts=st.lists(st.integers(0, 20), min_size=1, max_size=3),
)
def test_a_resumed_stream_equals_the_uninterrupted_one(setup: str, cuts: list[int]) -> None:
    def fresh() -> StreamingDataset:
        made = SETUPS[setup]()
        assert isinstance(made, StreamingDataset)
        return made

    whole = fresh()
    expected = [numbers(whole) for _ in range(2)]  # epochs
    state, resumed, got = saved(fresh()), fresh(), [[], []]
    for cut in [*cuts, None]:
        resumed = fresh()
        resumed.load_state_dict(state)
        epoch = resumed.epoch
        got[epoch] += numbers(islice(iter(resumed), cut))
        state = saved(resumed)
        if resumed.epoch > 1:
            return
    while resumed.epoch < 2:
        epoch = resumed.epoch
        got[epoch] += numbers(resumed)
    assert got == expected
    assert saved(resumed) == saved(whole)  # with all counts


@pytest.mark.parametrize("setup", sorted(SETUPS))
def test_resuming_after_any_example(setup: str) -> None:
    whole, cut = SETUPS[setup](), SETUPS[setup]()
    assert isinstance(whole, StreamingDataset) and isinstance(cut, StreamingDataset)
    expected = numbers(whole)
    for place, _ in enumerate(cut, start=1):
        resumed = SETUPS[setup]()
        assert isinstance(resumed, StreamingDataset)
        resumed.load_state_dict(saved(cut))
        assert numbers(resumed) == expected[place:]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_resuming_after_any_row_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    files = [str(tmp_path / f"{part}.{kind}") for part in range(3)]
    for part, file in enumerate(files):
        table = datasets.Dataset.from_list([{"number": 10 * part + n} for n in range(10)])
        table.to_parquet(file) if kind == "parquet" else table.to_json(file)
    options: Any = {"split": "train[4:27]", "filter": {"number": [*range(3, 30, 2)]}}

    def fresh() -> RowStream:
        rows = read_rows(files, streaming=True, on_bad_row="skip", **options)
        return RowStream(rows, encode, max_length=2)

    expected = numbers(fresh())
    assert sorted(expected) == [n for n in range(4, 27) if n % 2 and survives(n)]
    for cut in range(len(expected)):
        stopped, resumed = fresh(), fresh()
        list(islice(stopped, cut))
        resumed.load_state_dict(saved(stopped))
        assert numbers(resumed) == expected[cut:]


def test_what_is_changed_or_left_out_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    source = stream(26)
    with caplog.at_level(logging.WARNING):
        list(source)
    assert (source.truncated, source.dropped, source.skipped) == (2, 2, 3)
    assert "row 7: number: is bad" in caplog.text
    assert "3 bad rows were skipped" in caplog.text


def test_a_bad_row_is_an_error_that_names_its_place() -> None:
    with pytest.raises(UserError, match="^row 7: number: is bad$"):
        list(stream(26, on_bad_row="error"))
    data: Any = [{"number": BAD - 1, PLACE: "a.jsonl, row 3"}]
    with pytest.raises(UserError, match="^a.jsonl, row 3: number: is bad$"):
        list(RowStream(Rows(data, None), encode, max_length=None))


def test_rows_do_not_show_where_they_came_from() -> None:
    def columns(row: Mapping[str, Any]) -> dict[str, Any]:
        return {"input_ids": [1, 2], "labels": [1, 2], "columns": list(row)}

    data: Any = [{"number": 0, PLACE: "a.jsonl, row 3"}]
    (example,) = RowStream(Rows(data, None), columns, max_length=None)
    assert example["columns"] == ["number"]  # type: ignore[typeddict-item]


def test_the_state_of_another_mixture_is_refused() -> None:
    streams = stream(4), stream(4)
    state = mix(streams, [1, 2]).state_dict()  # type: ignore[union-attr]
    for other in (
        mix(streams, [1, 1]),
        mix(streams, [1, 2], seed=1),
        mix(streams, [1, 2], until=9),
    ):
        with pytest.raises(UserError, match="other weights, `until` or seed"):
            other.load_state_dict(state)  # type: ignore[union-attr]


def test_what_cannot_be_read_is_named_by_its_row() -> None:
    def rows(starts: list[int]) -> Iterator[dict[str, int]]:
        yield {"number": 1}
        b"\xff".decode()

    data = datasets.IterableDataset.from_generator(rows, gen_kwargs={"starts": [0]})
    source = RowStream(Rows(data, None, name="hub/data"), encode, max_length=None)
    with pytest.raises(
        UserError, match="^hub/data, row 2: it cannot be read .*utf-8.* nor skipped"
    ):
        list(source)
