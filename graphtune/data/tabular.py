"""Conversations from tables: a file, an in-memory list, or a data set on the hub."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from transformers import PreTrainedTokenizerBase

from graphtune.data.conversations import ConversationEncoder, Message
from graphtune.data.dataset import Dataset, Example
from graphtune.errors import UserError

Row = Mapping[str, Any]
Source = str | Path | Iterable[Row]

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_HUB_TIMEOUT_S = 10


def instruct(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: Source,
    split: str = "train",
    prompt_column: str = "prompt",
    response_column: str = "response",
    system: str | None = None,
    max_length: int | None = None,
    **load_dataset_options: Any,
) -> Dataset:
    """Prompts and responses, one pair per row.

    Args:
        tokenizer: the model's, with a chat template.
        source: a `.json`, `.jsonl`, `.csv` or `.parquet` file (or URL), a data set id on the
            Hugging Face hub, or a list of rows.
        split: which split to read; slices such as `train[:90%]` work for files and hub ids.
        prompt_column: column with the user's words.
        response_column: column with the assistant's words, which are trained.
        system: a system message before each prompt; None leaves it to the template.
        max_length: longer examples are cut at the end, in tokens.
        **load_dataset_options: passed on to `datasets.load_dataset` (`name`, `revision`, ...).

    Raises:
        UserError: no such source, split or column, a cell without text, or no rows.
    """

    def converse(row: Row) -> list[Message]:
        prompt = _text(row, prompt_column, "prompt_column")
        response = _text(row, response_column, "response_column")
        return conversation(prompt, response, system)

    rows = _rows(source, split, load_dataset_options)
    return encode_rows(tokenizer, rows, converse, max_length=max_length)


def alpaca(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: Source = "tatsu-lab/alpaca",
    split: str = "train",
    system: str | None = None,
    max_length: int | None = None,
    **load_dataset_options: Any,
) -> Dataset:
    """Rows of `instruction`, `input` (may be empty) and `output`, as in Stanford Alpaca.

    The prompt is the instruction, and the input below it where there is one. Arguments and
    errors as for `instruct`.
    """

    def converse(row: Row) -> list[Message]:
        prompt = _text(row, "instruction", "source")
        if row.get("input"):
            prompt = f"{prompt}\n\n{_text(row, 'input', 'source')}"
        return conversation(prompt, _text(row, "output", "source"), system)

    rows = _rows(source, split, load_dataset_options)
    return encode_rows(tokenizer, rows, converse, max_length=max_length)


def chat(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: Source,
    split: str = "train",
    messages_column: str = "messages",
    max_length: int | None = None,
    **load_dataset_options: Any,
) -> Dataset:
    """Conversations of any number of turns; every assistant turn is trained.

    `messages_column` holds a list of `{"role": ..., "content": ...}`. Other arguments and
    errors as for `instruct`.
    """

    def converse(row: Row) -> list[Message]:
        messages: list[Message] = _cell(row, messages_column, "messages_column")
        return messages

    rows = _rows(source, split, load_dataset_options)
    return encode_rows(tokenizer, rows, converse, max_length=max_length)


def conversation(prompt: str, response: str, system: str | None = None) -> list[Message]:
    """One question and its answer as messages."""
    opening = [{"role": "system", "content": system}] if system is not None else []
    return [
        *opening,
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response},
    ]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    converse: Callable[[Row], list[Message]],
    *,
    max_length: int | None,
) -> Dataset:
    """Encode `converse(row)` of every row; errors say which row they are about."""
    encode = ConversationEncoder(tokenizer)

    def examples() -> Iterator[Example]:
        for index, row in enumerate(rows):
            try:
                yield encode(converse(row))
            except UserError as error:
                raise UserError(f"{error} (row {index})") from error

    return Dataset.build(examples(), max_length=max_length)


def _cell(row: Row, column: str, key: str) -> Any:
    if column not in row:
        close = difflib.get_close_matches(column, row, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(row)}"
        raise UserError(f"dataset.{key}: the rows have no column {column!r}; {hint}")
    return row[column]


def _text(row: Row, column: str, key: str) -> str:
    cell = _cell(row, column, key)
    if not isinstance(cell, str):
        raise UserError(f"dataset.{key}: column {column!r} must hold text, not {cell!r:.60}")
    return cell


def _rows(source: Source, split: str, options: dict[str, Any]) -> Iterable[Row]:
    """Rows of a file, of a hub data set, or those given."""
    if not isinstance(source, str | Path):
        return source
    text = str(source)
    is_url = "://" in text
    path = text if is_url else str(Path(text).expanduser())
    suffixes = [suffix.lower() for suffix in Path(text).suffixes if suffix != ".gz"]
    builder = _BUILDERS.get(suffixes[-1]) if suffixes else None
    if builder and not is_url and not Path(path).is_file():
        raise UserError(f"dataset.source: there is no file {text!r}; check the path")
    if not builder and not Path(path).is_dir():
        _check_hub(text)
    try:
        if builder:
            return load_dataset(builder, data_files=path, split=split, **options)
        return load_dataset(path, split=split, **options)
    except (DatasetsError, OSError, ValueError, TypeError, StopIteration) as error:
        cause = error.__cause__ or error  # of a DatasetGenerationError; StopIteration: no rows
        reason = (str(cause).strip() or "it holds no rows").splitlines()[0]
        raise UserError(
            f"dataset.source: cannot read split {split!r} of {text!r}: {reason}"
        ) from error


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
            f"dataset.source: {id!r} is neither a {', '.join(_BUILDERS)} file here nor a data set "
            "on the Hugging Face hub; check the spelling, and log in for a private one"
        ) from error
    except Exception as error:  # no connection, or a server's failure
        raise UserError(
            f"dataset.source: {id!r} is no file here, and the Hugging Face hub cannot be reached "
            f"({error}); check the spelling or the network, or set HF_HUB_OFFLINE=1 to use a copy "
            "that was downloaded before"
        ) from error
