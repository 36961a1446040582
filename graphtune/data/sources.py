"""Open a source: files, folders, URLs, hub data sets and data in memory, as splits of rows."""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
import pyarrow
from datasets import Dataset as Table
from datasets import IterableDataset as Stream
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from graphtune.data.files import (
    KINDS,
    Row,
    SampleBy,
    kind_of,
    scan,
    scan_streams,
    text_table,
    unreadable,
)
from graphtune.errors import UserError

Source = str | Path | Iterable[Any] | Mapping[str, Sequence[Any]]
"""A file, a list or a glob of files, a folder, a URL, a hub id; a `datasets.Dataset` or
`IterableDataset`, a list of rows, or a mapping of columns to lists."""

_HUB_TIMEOUT_S = 10
_ERRORS = (
    DatasetsError,
    ImportError,
    NotImplementedError,
    OSError,
    RuntimeError,  # a data set that is a script
    StopIteration,  # no rows
    TypeError,
    ValueError,
)
_MODULES = ("json", "csv", "text", "parquet", "arrow", "imagefolder", "webdataset")


@dataclass
class Opened:
    """A source's splits, before any row is chosen.

    Attributes:
        splits: rows by the name of the split.
        name: the source, for messages.
        files: the local files of each split in the order of its rows; empty if not known.
    """

    splits: Mapping[str, Table | Stream | list[Row]]
    name: str = ""
    files: Mapping[str, list[str]] = field(default_factory=dict)


def open_source(source: Source, options: Mapping[str, Any]) -> Opened:
    """Open `source`; the options are those of `RowOptions` that say what to read.

    Raises:
        UserError: no such source, or it cannot be read.
    """
    memory = _in_memory(source)
    if memory is not None:
        splits = {split: _undecoded(data) for split, data in memory.items()}
        return Opened(_as_streams(splits) if options.get("streaming") else splits)
    paths = [source] if isinstance(source, str | os.PathLike) else list(source)
    name = ", ".join(map(str, paths))
    try:
        return _load(list(map(str, paths)), name, options)
    except UserError:
        raise
    except _ERRORS as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or "it holds no rows").splitlines()[0]
        raise UserError(f"dataset.source: cannot read {name!r}: {reason}") from error


def _in_memory(source: Source) -> dict[str, Any] | None:
    """The splits of a source that holds the rows themselves; None if it says where they are."""
    if isinstance(source, str | os.PathLike):
        return None
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        return dict(source)
    if isinstance(source, Table | Stream):
        return {"train": source}
    if not isinstance(source, Iterable):
        raise UserError(f"dataset.source: {source!r:.60} is no path, hub id or list of rows")
    if isinstance(source, Mapping):
        return {"train": _from_columns(source)}
    rows = list(source)
    if rows and all(isinstance(row, str | os.PathLike) for row in rows):
        return None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise UserError(
                f"dataset.source: row {number} must be a mapping of columns, not {row!r:.60}"
            )
    return {"train": rows}


def _from_columns(columns: Mapping[str, Sequence[Any]]) -> list[Row]:
    lengths = {
        name: None if isinstance(column, str) or not isinstance(column, Sequence) else len(column)
        for name, column in columns.items()
    }
    if None in lengths.values() or len(set(lengths.values())) > 1:
        raise UserError(
            "dataset.source: a mapping must give each column a list, all of one length; "
            f"the lengths are {lengths}"
        )
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _as_streams(splits: Mapping[str, Any]) -> dict[str, Stream]:
    def stream(data: Any) -> Stream:
        if isinstance(data, Stream):
            return data
        if isinstance(data, Table):
            return data.to_iterable_dataset()
        return Stream.from_generator(_each, gen_kwargs={"rows": data})

    return {name: stream(data) for name, data in splits.items()}


def _each(rows: Sequence[Row]) -> Iterator[Row]:
    yield from rows


def _load(paths: list[str], name: str, options: Mapping[str, Any]) -> Opened:
    streaming = bool(options.get("streaming"))
    folder = Path(name).expanduser()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        found = _in_memory(datasets.load_from_disk(folder))
        assert found is not None
        splits = {split: _undecoded(data) for split, data in found.items()}
        return Opened(_as_streams(splits) if streaming else splits, name)
    arguments = _arguments(paths, options)
    builder = datasets.load_dataset_builder(**arguments)
    files = _local_files(builder)
    if files and streaming:
        return Opened(scan_streams(files, options.get("sample_by", "line")), name, files)
    if files and not streaming:
        rows = _read_text(builder.name, files, options.get("sample_by", "line"), arguments)
        if rows is not None:
            return Opened(rows, name, files)
    loaded = datasets.load_dataset(**arguments, streaming=streaming)
    splits = {split: _undecoded(data) for split, data in loaded.items()}
    if files:
        splits = {split: _with_valid_text(table) for split, table in splits.items()}
    return Opened(splits, name, files)


def _arguments(paths: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """What `datasets.load_dataset` is to be called with."""
    arguments = {
        key: options[key]
        for key in ("name", "revision", "data_dir", "data_files")
        if options.get(key) is not None
    }
    (first, *others) = paths
    if not others and first in _MODULES and ("data_files" in arguments or "data_dir" in arguments):
        return arguments | {"path": first}
    found = [file for path in paths for file in _expand(path)]
    kinds = {kind_of(urlsplit(file).path if "://" in file else file) for file in found}
    if found and len(kinds) == 1 and None not in kinds:
        (kind,) = kinds
        sampling = {"sample_by": options["sample_by"]} if "sample_by" in options else {}
        return (
            arguments | {"path": kind, "data_files": found} | (sampling if kind == "text" else {})
        )
    if others or any(Path(file).is_file() for file in found):
        raise UserError(
            f"dataset.source: files must be of one kind, {', '.join(KINDS)}, not "
            f"{', '.join(sorted({Path(file).suffix or file for file in found}))}"
        )
    if not Path(first).expanduser().is_dir():
        _check_hub(first)
    return arguments | {"path": str(Path(first).expanduser()) if found else first}


def _expand(path: str) -> list[str]:
    """The files or the folder that `path` stands for; itself if it is a URL; none for a hub id."""
    if "://" in path:
        return [path]
    local = str(Path(path).expanduser())
    if os.path.exists(local):
        return [local]
    if glob.has_magic(local):
        matches = sorted(match for match in glob.glob(local, recursive=True) if kind_of(match))
        if not matches:
            raise UserError(f"dataset.source: no {', '.join(KINDS)} file matches {path!r}")
        return matches
    if kind_of(path):
        raise UserError(f"dataset.source: there is no file {path!r}; check the path")
    return []


def _local_files(builder: Any) -> dict[str, list[str]]:
    """The builder's files by split, if all are local and of a kind that `find_row` can count."""
    files = {
        str(split): [str(path) for path in paths]
        for split, paths in (builder.config.data_files or {}).items()
    }
    known = all(
        kind_of(path) and os.path.isfile(path) for paths in files.values() for path in paths
    )
    return files if known else {}


def _read_text(
    kind: str, files: dict[str, list[str]], sample_by: SampleBy, arguments: dict[str, Any]
) -> dict[str, Any] | None:
    """Local text files: in Arrow's form if they have one, else as a list. None: no text files.

    Cells of CSV files stay the text that they are: "007" is no number and "NA" not missing.
    """
    if kind not in ("json", "csv", "text"):
        return None
    try:
        if kind == "json":
            with _quiet("datasets.packaged_modules.json.json"):
                splits = dict(datasets.load_dataset(**arguments))
            if all(_is_faithful(table) for table in splits.values()):
                return splits
        else:
            return {split: text_table(paths, sample_by) for split, paths in files.items()}
    except _ERRORS:
        pass
    return {
        split: [row for path in paths for _, row in scan(path, sample_by)]
        for split, paths in files.items()
    }


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the errors of a reader whose failure is dealt with."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_faithful(table: Table) -> bool:
    """Whether texts are still what the file has: Arrow takes a column of dates for times, and
    bytes that are not UTF-8 for text; `datasets` reads texts as JSON ("4" as 4) in a column that
    has lists or mappings too."""
    kinds = str(table.features)
    return "Value('timestamp" not in kinds and "Json(" not in kinds and _is_valid(table)


def _is_valid(table: Table) -> bool:
    try:
        table.data.table.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


def _with_valid_text(table: Table) -> Table | list[Row]:
    """The table, or its rows as a list if some hold bytes that are not UTF-8."""
    if _is_valid(table):
        return table
    return [_readable_row(table, index) for index in range(len(table))]


def _readable_row(table: Table, index: int) -> Row:
    try:
        return table[index]
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 ({error.reason})"
    for column in table.column_names:
        try:
            table.select_columns(column)[index]
        except UnicodeDecodeError:
            return unreadable(problem, column)
    return unreadable(problem)


def _undecoded(data: Any) -> Any:
    """`data` with the images of all its columns as files: `{"bytes": ..., "path": ...}`.

    `datasets` decodes images when it reads a row, and what it raises over a broken one names
    neither row nor field; `open_image` does. Nothing is copied; lists of rows stay as they are.
    """
    if isinstance(data, Stream) and data.features:
        return data.decode(False)
    if not isinstance(data, Table) or (features := _as_files(data.features)) == data.features:
        return data
    data = data.with_format(data.format["type"], columns=data.format["columns"])  # a new object
    data.info.features = features
    return data


def _as_files(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(mode=feature.mode, decode=False)
    if isinstance(feature, Mapping):
        inner = {name: _as_files(one) for name, one in feature.items()}
        return datasets.Features(inner) if isinstance(feature, datasets.Features) else inner
    if isinstance(feature, datasets.List | datasets.LargeList):
        return dataclasses.replace(feature, feature=_as_files(feature.feature))
    return feature


def _check_hub(id: str) -> None:
    """Ask the hub for `id` once; left to itself, `load_dataset` retries for half a minute.

    In offline mode nothing is asked: `load_dataset` then looks in its cache.
    """
    try:
        HfApi().dataset_info(id, timeout=_HUB_TIMEOUT_S)
    except OfflineModeIsEnabled:
        pass
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"dataset.source: {id!r} is neither a file ({', '.join(KINDS)}) or folder here nor a "
            "data set on the Hugging Face hub; check the spelling, and log in for a private one"
        ) from error
    except Exception as error:  # no connection, or a server's failure
        raise UserError(
            f"dataset.source: {id!r} is no file here, and the Hugging Face hub cannot be reached "
            f"({error}); check the spelling or the network, or set HF_HUB_OFFLINE=1 to use a copy "
            "that was downloaded before"
        ) from error
