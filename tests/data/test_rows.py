"""Rows: every kind of source gives the same ones, which are chosen the same way."""

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset as Table
from datasets import DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from graphtune.data.files import scan
from graphtune.data.images import open_image
from graphtune.data.rows import PLACE, held_out, read_rows
from graphtune.errors import UserError

ROWS = [{"prompt": f"What is {n} + 1?", "response": str(n + 1)} for n in range(8)]
FILES = ["a.json", "a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet", "object.json"]


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    separator = "\t" if path.suffix == ".tsv" else ","
    if path.name == "object.json":
        path.write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".parquet":
        Table.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text(lines)
    else:
        cells = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
        path.write_text("".join(separator.join(row) + "\n" for row in cells))
    return path


def read(source: Any, **options: Any) -> list[dict[str, Any]]:
    rows = read_rows(source, **options)
    assert rows.streaming == bool(options.get("streaming"))
    return [{k: v for k, v in row.items() if k != PLACE} for row in rows.data]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, streaming: bool) -> None:
    path = write(ROWS, tmp_path / name)
    assert read(path, streaming=streaming) == ROWS
    assert read(str(path), split="train[2:5]", streaming=streaming) == ROWS[2:5]


def test_sources_in_memory() -> None:
    for source in (
        ROWS,
        iter(ROWS),
        Table.from_list(ROWS),
        {column: [row[column] for row in ROWS] for column in ROWS[0]},
        DatasetDict({"train": Table.from_list(ROWS)}),
        Table.from_list(ROWS).to_iterable_dataset(),
    ):
        streaming = type(source).__name__ == "IterableDataset"
        rows = read_rows(source)
        assert (list(rows.data), rows.streaming) == (ROWS, streaming)
    assert read(ROWS, streaming=True) == ROWS
    assert read(Table.from_list(ROWS), streaming=True) == ROWS


def test_lists_globs_and_folders_of_files(tmp_path: Path) -> None:
    first = write(ROWS[:3], tmp_path / "1.jsonl")
    second = write(ROWS[3:], tmp_path / "2.jsonl")
    assert read([first, second]) == ROWS
    assert read([str(second), str(first)]) == ROWS[3:] + ROWS[:3]
    assert read(str(tmp_path / "*.jsonl")) == ROWS
    assert read(str(tmp_path / "*.jsonl"), streaming=True) == ROWS
    assert read(tmp_path) == ROWS
    assert read("json", data_files=[str(first), str(second)]) == ROWS
    files: dict[str, str | list[str]] = {"train": str(first), "test": str(second)}
    assert read("json", data_files=files, split="test") == ROWS[3:]
    assert read("json", data_files=files, split="train+test[:2]") == ROWS[:5]
    assert (
        read_rows("json", data_files=files, split="test+train[1:]")
        .place(6)
        .endswith("1.jsonl, row 3")
    )


def test_folders_of_images_and_saved_data_sets(tmp_path: Path) -> None:
    Table.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", split="train[:2]") == ROWS[:2]
    (tmp_path / "images").mkdir()
    for n in range(12):
        Image.new("RGB", (2, 2), (n, n, n)).save(tmp_path / f"images/{n:02}.png")
    lines = [json.dumps({"file_name": f"{n:02}.png", "text": f"image {n}"}) for n in range(12)]
    (tmp_path / "images/metadata.jsonl").write_text("\n".join(lines))
    rows = read(tmp_path / "images")
    assert [(open_image(row["image"]).getpixel((0, 0))[0], row["text"]) for row in rows] == [
        (n, f"image {n}") for n in range(12)
    ]
    sizes = []
    for streaming in (False, True):
        for part in ("train", "validation"):
            options = {"validation": 0.5, "part": part, "streaming": streaming}
            found = read(tmp_path / "images", **options)
            assert all(open_image(row["image"]).size == (2, 2) for row in found)
            sizes.append([row["text"] for row in found])
    assert sizes[:2] == sizes[2:]
    assert sorted(sizes[0] + sizes[1]) == sorted(f"image {n}" for n in range(12))

    def is_bright(row: Any) -> bool:
        return open_image(row["image"]).getpixel((0, 0))[0] > 9  # type: ignore[index,operator]

    bright = read(tmp_path / "images", filter=is_bright)
    assert len(bright) == 2


def test_cells_of_csv_files_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('n,t\n007,NA\n1.50,"two\nlines, and a comma"\n,null\n')
    assert read(tmp_path / "a.csv") == [
        {"n": "007", "t": "NA"},
        {"n": "1.50", "t": "two\nlines, and a comma"},
        {"n": "", "t": "null"},
    ]


def test_dates_in_json_stay_text(tmp_path: Path) -> None:
    rows = [{"prompt": "When?", "response": f"2024-01-0{n}"} for n in (1, 2)]
    assert read(write(rows, tmp_path / "a.jsonl")) == rows


def test_columns_that_change_type_are_read_as_they_are(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"x": "text", "calls": [{"arguments": {"a": 1}}]},
        {"x": 3, "calls": [{"arguments": {"b": "c"}}]},
        {"x": ["list"], "calls": []},
    ]
    path = write(rows, tmp_path / "a.jsonl")
    assert read(path) == rows == read(path, streaming=True)


@pytest.mark.parametrize(
    ("sample_by", "texts"),
    [
        ("line", ["one", "two", "three"]),
        ("paragraph", ["one\ntwo", "three"]),
        ("document", ["one\ntwo\n\n \nthree\n"]),
    ],
)
def test_text_files(tmp_path: Path, sample_by: Any, texts: list[str]) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \nthree\n")
    for streaming in (False, True):
        rows = read(tmp_path / "a.txt", sample_by=sample_by, streaming=streaming)
        assert [row["text"] for row in rows] == texts


def test_places_count_rows_from_1_and_name_other_lines(tmp_path: Path) -> None:
    csv = tmp_path / "a.csv"
    csv.write_text('n,t\n1,"two\nlines"\n2,b\n')
    assert read_rows(csv).place(1) == f"{csv}, row 2 (line 4)"
    assert [row[PLACE] for row in read_rows(csv, streaming=True).data][1].endswith("row 2 (line 4)")
    jsonl = write(ROWS, tmp_path / "a.jsonl")
    chosen = read_rows(jsonl, split="train[2:]", filter={"response": ["4", "7"]})
    assert [chosen.place(i) for i in range(2)] == [f"{jsonl}, row {n}" for n in (4, 7)]
    tables = [write(ROWS[:3], tmp_path / "1.parquet"), write(ROWS[3:], tmp_path / "2.parquet")]
    assert read_rows(tables).place(4) == f"{tables[1]}, row 2"
    assert read_rows(ROWS, filter={"response": "5"}).place(0) == "row 5"


@given(n=st.integers(1, 60), split=st.sampled_from(["", "[3:]", "[:50%]", "[-5:]"]))
def test_a_place_is_where_the_row_is(n: int, split: str) -> None:
    rows = read_rows([{"number": i} for i in range(n + 10)], split=f"train{split}")
    for index in (0, len(rows.data) - 1):
        assert rows.place(index) == f"row {rows.data[index]['number'] + 1}"


# Choosing


def is_even(row: Any) -> bool:
    return int(row["response"]) % 2 == 0


@pytest.mark.parametrize("source", ["list", "table", "stream", "file"])
def test_filters(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {
        "list": ROWS,
        "table": Table.from_list(ROWS),
        "stream": Table.from_list(ROWS).to_iterable_dataset(),
        "file": write(ROWS, tmp_path / "a.csv"),
    }
    rows = made[source]

    def kept(condition: Any) -> list[int]:
        return [int(row["response"]) for row in read_rows(rows, filter=condition).data]

    assert kept(lambda row: row["response"] > "5") == [6, 7, 8]
    assert kept({"response": "3"}) == [3]
    assert kept({"response": ["3", "9", "5"]}) == [3, 5]
    assert kept({"response": ["3", "5"], "prompt": "What is 4 + 1?"}) == [5]
    assert kept({"response": [3, 5]}) == [3, 5]  # as YAML reads numbers
    monkeypatch.setitem(sys.modules, "rows_test", sys.modules[__name__])
    assert kept("rows_test.is_even") == [2, 4, 6, 8]
    with pytest.raises(UserError, match="no column 'respons'; did you mean 'response'"):
        kept({"respons": "3"})


def test_filters_that_are_none_or_keep_none() -> None:
    with pytest.raises(UserError, match="dataset.filter: 'no.such.thing' names no function"):
        read_rows(ROWS, filter="no.such.thing")
    with pytest.raises(UserError, match="dataset.filter: none of the 8 rows is left"):
        read_rows(ROWS, filter={"response": "none"})


NUMBERED = [{"text": f"row {n}", "tags": None, "n": n} for n in range(400)]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_held_out_part_is_disjoint_complete_and_of_the_share(seed: int) -> None:
    parts = {
        part: {row["n"] for row in read(NUMBERED, validation=0.1, part=part, validation_seed=seed)}
        for part in ("train", "validation")
    }
    assert not parts["train"] & parts["validation"]
    assert len(parts["train"] | parts["validation"]) == 400
    assert 20 < len(parts["validation"]) < 60


def test_the_same_rows_are_held_out_however_they_are_read(tmp_path: Path) -> None:
    path = write([{"a": f"{n}", "b": None} for n in range(50)], tmp_path / "a.jsonl")
    rows = [{"a": f"{n}"} for n in range(50)]
    table = write(rows, tmp_path / "a.parquet")
    expected = [row for row in rows if held_out(row, 0.3)]
    assert 0 < len(expected) < 50
    for source in (rows, Table.from_list(rows), path, table, list(reversed(rows))):
        for streaming in (False, True):
            found = read(source, validation=0.3, part="validation", streaming=streaming)
            assert sorted(int(row["a"]) for row in found) == [int(row["a"]) for row in expected]


def test_another_seed_holds_out_others_and_equal_rows_stay_together() -> None:
    def chosen(rows: Any, **options: Any) -> list[int]:
        return [row["n"] for row in read(rows, validation=0.2, part="validation", **options)]

    assert chosen(NUMBERED) != chosen(NUMBERED, validation_seed=1)
    assert chosen(NUMBERED * 2) == chosen(NUMBERED) * 2
    assert set(chosen(NUMBERED[100:])) <= set(chosen(NUMBERED))


# Fingerprints


def test_a_fingerprint_changes_with_any_row(tmp_path: Path) -> None:
    path = write(ROWS, tmp_path / "a.jsonl")

    def fingerprint(source: Any, **options: Any) -> str:
        found = read_rows(source, **options).fingerprint
        assert found
        return found

    for source in (path, ROWS, Table.from_list(ROWS)):
        prints = [
            fingerprint(source),
            fingerprint(source, split="train[:4]"),
            fingerprint(source, filter={"response": "3"}),
            fingerprint(source, filter={"response": "4"}),
            fingerprint(source, validation=0.5),
            fingerprint(source, validation=0.5, part="validation"),
        ]
        assert len(set(prints)) == len(prints)
        assert fingerprint(source) == prints[0]
    before = fingerprint(path)
    changed = [*ROWS[:-1], {**ROWS[-1], "response": "0"}]
    assert fingerprint(changed) != fingerprint(ROWS)
    write(changed, path)
    os.utime(path, ns=(1, 1))
    assert fingerprint(path) != before
    assert read(path) == changed


def test_what_has_no_fixed_content_has_no_fingerprint() -> None:
    assert read_rows([{"a": object()}]).fingerprint is None
    assert read_rows(ROWS, streaming=True).fingerprint is None
    images = [{"a": Image.new("RGB", (2, 2), color)} for color in ("red", "blue")]
    prints = {read_rows([image]).fingerprint for image in images}
    assert len(prints) == 2 and None not in prints
    with pytest.raises(UserError, match="dataset.validation: .* a object has no fixed content"):
        read_rows([{"a": object()}], validation=0.5)


# What is refused


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere.jsonl", {}, "dataset.source: there is no file 'nowhere.jsonl'"),
        ("nowhere/*.jsonl", {}, "dataset.source: no .* file matches 'nowhere/"),
        (["a.jsonl", "b.csv"], {}, "dataset.source: there is no file 'a.jsonl'"),
        (3, {}, "dataset.source: 3 is no path"),
        ([], {}, "holds no rows"),
        ([*ROWS, 3], {}, "dataset.source: row 9 must be a mapping of columns, not 3"),
        ({"a": [1], "b": [1, 2]}, {}, "dataset.source: .*'a': 1, 'b': 2"),
        ({"a": "text"}, {}, "dataset.source: .* each column a list"),
        (ROWS, {"split": "tset"}, "dataset.split: .*'tset'; there is only 'train'"),
        (ROWS, {"split": "train[oops]"}, r"dataset.split: .*'train\[oops\]'"),
        (ROWS, {"split": "train[5:2]"}, "holds no rows"),
        (ROWS, {"split": "train[:10%]", "streaming": True}, "dataset.split: .* sliced in rows"),
        (ROWS, {"split": "tset", "streaming": True}, "dataset.split: .*'tset'"),
        (ROWS, {"on_bad_row": "drop"}, "dataset.on_bad_row: 'drop' is unknown; use error or skip"),
        (ROWS, {"part": "test"}, "dataset.part: 'test' is unknown"),
        (ROWS, {"part": "validation"}, "dataset.part: nothing is held out"),
        (ROWS, {"validation": 5}, "dataset.validation: 5 is no share"),
        (ROWS[:1], {"validation": 0, "part": "validation"}, "none of the 1 rows is left"),
        (ROWS, {"sample_by": "word"}, "dataset.sample_by: 'word' is unknown"),
        (ROWS, {"filter": 3}, "dataset.filter: 3 is no function"),
    ],
)
def test_refusals(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as info:
        read_rows(source, **options)
    assert "\n" not in str(info.value)


def test_files_of_two_kinds_and_empty_files_are_refused(tmp_path: Path) -> None:
    files = [write(ROWS, tmp_path / "a.csv"), write(ROWS, tmp_path / "a.jsonl")]
    with pytest.raises(UserError, match="files must be of one kind"):
        read_rows(files)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="empty.jsonl.* holds no rows"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="dataset.source: cannot read '.*a.parquet'"):
        read_rows(tmp_path / "a.parquet")


@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from("abc"), st.text() | st.integers(), min_size=1), min_size=1
    ),
    indent=st.sampled_from([None, 1]),
)
def test_scan_reads_what_json_wrote(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None
) -> None:
    folder = tmp_path_factory.mktemp("scan")
    (folder / "a.json").write_text(json.dumps(rows, indent=indent))
    (folder / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    assert [row for _, row in scan(str(folder / "a.json"))] == rows
    found = list(scan(str(folder / "a.jsonl")))
    assert found == [(2 * i + 1, row) for i, row in enumerate(rows)]


def test_parquet_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    column = pa.array([b"fine", b"\xff"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"a": ["x", "y"], "b": column}), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert first == {"a": "x", "b": "fine"}
    assert second == {"unreadable row": ["b", "not valid UTF-8 (invalid start byte)"]}
    (line, row), (_, unreadable) = scan(str(tmp_path / "a.parquet"))
    assert (line, row, unreadable) == (1, first, second)


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_stay_texts_beside_lists_and_mappings(tmp_path: Path, streaming: bool) -> None:
    rows = [{"a": "4", "b": "true"}, {"a": [1], "b": {"x": 1}}, {"a": "[]", "b": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read(tmp_path / "a.jsonl", streaming=streaming)
    assert [{key: row[key] for key in ("a", "b")} for row in found] == rows
