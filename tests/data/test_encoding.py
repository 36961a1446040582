"""Rows are encoded once, in parallel, and the outcome is found again: never another one's."""

import logging
import multiprocessing
import operator
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from graphtune.data import encoding, example_cache
from graphtune.data.dataset import IGNORE_INDEX, Dataset
from graphtune.data.encoding import encode_rows
from graphtune.data.fields import BadRow
from graphtune.data.rows import Rows, read_rows
from graphtune.data.streaming import RowStream
from graphtune.errors import UserError

ROWS = [{"text": "ab" * (number % 5 + 1), "number": number} for number in range(30)]


class Encoder:
    """Characters as tokens; counts its calls, in this process and in all."""

    def __init__(self, log: Path | None = None, bad: tuple[int, ...] = ()) -> None:
        self.log, self.bad, self.calls = log, bad, 0

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        self.calls += 1
        if self.log is not None:
            with self.log.open("a") as stream:
                stream.write(f"{os.getpid()}\n")
        if row["number"] in self.bad:
            raise BadRow("text", f"{row['text']!r} is bad")
        ids = [ord(letter) for letter in row["text"]]
        return {"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]], "number": row["number"]}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(encoding, "_CHUNK", 4)
    return tmp_path / "cache" / "examples"


def encoded(encode: Any, rows: Any = None, **options: Any) -> Dataset:
    rows = Rows(ROWS, "rows", name="list") if rows is None else rows
    dataset = encode_rows(rows, encode, **{"key": "letters", "max_length": None, **options})
    assert isinstance(dataset, Dataset)
    return dataset


def expected(max_length: int | None = None) -> Dataset:
    encode = Encoder()
    return Dataset.build([encode(row) for row in ROWS], max_length=max_length)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("table", [False, True])
def test_rows_are_encoded_in_order_by_any_number_of_processes(
    tmp_path: Path, workers: int, table: bool
) -> None:
    log = tmp_path / "calls"
    data: Any = datasets.Dataset.from_list(ROWS) if table else ROWS
    dataset = encoded(Encoder(log), Rows(data, None), workers=workers)
    assert dataset == expected()
    processes = log.read_text().split()
    assert len(processes) == len(ROWS)
    assert (str(os.getpid()) in processes) == (workers == 1)


def test_a_second_time_nothing_is_encoded(home: Path) -> None:
    first, again = Encoder(), Encoder()
    dataset = encoded(first, max_length=4)
    assert dataset == expected(4)
    found = encoded(again, max_length=4)
    assert found == dataset
    assert (first.calls, again.calls) == (len(ROWS), 0)
    assert found.truncated == dataset.truncated == 18
    assert [file.suffix for file in sorted(home.iterdir())] == [".arrow", ".json", ".lock"]
    assert pickle.loads(pickle.dumps(found)) == dataset  # by its file, without the encoder
    assert len(pickle.dumps(found)) < 2000


def test_each_part_of_the_key_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded(Encoder(), max_length=4)
    for change in (
        {"rows": Rows(ROWS, "other rows")},
        {"rows": Rows(ROWS, "rows", on_bad_row="skip")},
        {"key": "other letters"},
        {"max_length": 5},
        {"truncate": "left"},
    ):
        encode = Encoder()
        encoded(encode, **{"max_length": 4, **change})
        assert encode.calls == len(ROWS), change
    for name, value in (("_source", lambda: "newer"), ("version", lambda package: "newer")):
        monkeypatch.setattr(example_cache, name, value)
        encode = Encoder()
        encoded(encode, max_length=4)
        assert encode.calls == len(ROWS), name


def test_rows_that_cannot_be_told_apart_are_not_kept(home: Path) -> None:
    encode = Encoder()
    for calls in (1, 2):
        assert encoded(encode, Rows(ROWS, None)) == expected()
        assert encode.calls == calls * len(ROWS)
    assert not home.exists()


@pytest.mark.parametrize("damage", ["shorter", "longer", "other", "empty", "missing", "counts"])
def test_a_damaged_entry_is_made_again(
    home: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoded(Encoder())
    (table,), (counts,) = home.glob("*.arrow"), home.glob("*.json")
    whole = table.read_bytes()
    if damage == "missing":
        table.unlink()
    elif damage == "counts":
        counts.write_text("{")
    else:
        middle = len(whole) // 2
        other = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        parts = {"shorter": whole[:-9], "longer": whole + b"x", "other": other, "empty": b""}
        table.write_bytes(parts[damage])
    encode = Encoder()
    assert encoded(encode) == expected()
    assert encode.calls == len(ROWS)
    assert "encoding again" in caplog.text
    assert table.read_bytes() == whole
    assert encoded(encode) == expected() and encode.calls == len(ROWS)


def test_an_interrupted_run_leaves_nothing(home: Path) -> None:
    class Interrupted(Encoder):
        def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
            if row["number"] == 20:
                raise KeyboardInterrupt
            return super().__call__(row)

    with pytest.raises(KeyboardInterrupt):
        encoded(Interrupted())
    assert [file.suffix for file in home.iterdir()] == [".lock"]
    assert encoded(Encoder()) == expected()


def test_a_disk_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRAPHTUNE_CACHE", str(tmp_path / "file"))
    assert encoded(Encoder()) == expected()
    assert "cannot be kept" in caplog.text


def test_of_many_processes_at_once_one_encodes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "calls"

    def rank() -> None:
        torch.set_num_threads(1)
        assert encoded(Encoder(log)) == expected()

    ranks = [context.Process(target=rank) for _ in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * 4
    assert len(log.read_text().split()) == len(ROWS)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_bad_row_is_an_error_that_names_it(workers: int, home: Path) -> None:
    with pytest.raises(UserError, match=r"^list, row 14: text: 'abababab' is bad$"):
        encoded(Encoder(bad=(13, 14, 25)), workers=workers)
    assert [file.suffix for file in home.iterdir()] == [".lock"]


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_rows_are_skipped_counted_and_reported(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    bad = (3, 4, 13, 25)
    rows = Rows(ROWS, "rows", on_bad_row="skip", name="list")
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        dataset = encoded(Encoder(bad=bad), rows, workers=workers)
        assert dataset.skipped == len(bad)
        assert [example["number"] for example in dataset] == [  # type: ignore[typeddict-item]
            row["number"] for row in ROWS if row["number"] not in bad
        ]
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert warning.startswith("dataset: 4 bad rows were skipped: list, row 4: text: ")
        assert "row 14" in warning and "row 26" not in warning and warning.endswith("; ...")


def test_nothing_to_train_on_is_an_error(home: Path) -> None:
    numbers = tuple(range(len(ROWS)))
    with pytest.raises(UserError, match="of 30 rows 30 are bad .* the first: list, row 1: text"):
        encoded(Encoder(bad=numbers), Rows(ROWS, "rows", on_bad_row="skip", name="list"))
    with pytest.raises(UserError, match="dataset: it holds no examples"):
        encoded(Encoder(), Rows([], "none"))

    def silent(row: Mapping[str, Any]) -> dict[str, Any]:
        return {"input_ids": [1, 2, 3, 4], "labels": [IGNORE_INDEX] * 3 + [4]}

    with pytest.raises(UserError, match="max_length: 3 leaves nothing .* 30 examples"):
        encoded(silent, max_length=3)
    assert len(encoded(silent, max_length=3, truncate="left")) == len(ROWS)


def test_a_users_error_names_the_row_too() -> None:
    def refuse(row: Mapping[str, Any]) -> dict[str, Any]:
        raise UserError("dataset.template: it cannot be rendered")

    with pytest.raises(UserError, match="^list, row 1: dataset.template: it cannot"):
        encoded(refuse, Rows(ROWS, "rows", on_bad_row="skip", name="list"), workers=2)


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(UserError, match="dataset.workers: a process .* fewer than 2"):
        encoded(lambda row: os._exit(1), workers=2)


@pytest.mark.parametrize(
    ("option", "value"), [("workers", 0), ("truncate", "middle"), ("max_length", 1)]
)
def test_options_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^dataset.{option}: "):
        encoded(Encoder(), **{option: value})


def test_an_encoder_that_cannot_be_sent_to_processes_runs_in_this_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encoding, "_start_method", lambda: "spawn")
    encode = Encoder()
    assert encoded(lambda row: encode(row), workers=2) == expected()
    assert encode.calls == len(ROWS)
    assert "encoding with one process" in caplog.text


@pytest.mark.slow
def test_processes_that_are_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_start_method", lambda: "spawn")
    encode = Encoder()
    rows: Any = [{"example": encode(row)} for row in ROWS]
    assert encoded(operator.itemgetter("example"), Rows(rows, None), workers=2) == expected()


def test_images_are_made_again_when_they_are_read() -> None:
    made: list[int] = []

    def draw(row: Mapping[str, Any]) -> dict[str, Any]:
        made.append(row["number"])
        example = Encoder()(row)
        if row["number"] % 2:
            example["images"] = {"pixel_values": torch.full((3, 64, 64), float(row["number"]))}
        return example

    for first in (list(range(30)), []):  # the second time from the cache
        dataset = encoded(draw, max_length=6)
        assert made == first
        made.clear()
        # Of the twelve longer than `max_length`, the six with images are left out.
        assert dataset.lengths.max() == 6
        numbers = [int(example["number"]) for example in dataset]  # type: ignore[typeddict-item]
        odd = [number for number in numbers if number % 2]
        assert made == odd
        assert dataset.dropped == 6 and len(dataset) == 24
        place = numbers.index(odd[3])
        assert dataset[place]["images"]["pixel_values"][0, 0, 0] == odd[3]
        made.clear()


def test_a_stream_is_encoded_as_it_is_read() -> None:
    rows = read_rows(ROWS, streaming=True)
    encode = Encoder()
    stream = encode_rows(rows, encode, key="letters", max_length=4)
    assert isinstance(stream, RowStream) and encode.calls == 0
    first = next(iter(stream))
    assert encode.calls == 1
    assert np.array_equal(first["input_ids"], expected()[0]["input_ids"])
    assert len(list(stream)) == len(ROWS) - 1
