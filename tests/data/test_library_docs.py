"""Pairs from docstrings: clean, the same in every process, and splits apart."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

import graphtune.data
from graphtune.data import IGNORE_INDEX, Dataset, docstrings
from graphtune.data.library_docs import Documented, documented_callables, first_sentence
from graphtune.errors import UserError

PACKAGES = ("python", "numpy", "torch")


@pytest.fixture(scope="module")
def documented() -> list[Documented]:
    return documented_callables(PACKAGES)


def pairs(tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> dict[str, str]:
    """Question -> answer, read back from the tokens."""
    found = {}
    for example in dataset:
        text = tokenizer.decode(example["input_ids"])
        answer = [label for label in example["labels"] if label != IGNORE_INDEX]
        question = text.split("user\n")[1].split("<|im_end|>")[0]
        found[question] = tokenizer.decode(answer)
    return found


def test_there_are_thousands_of_clean_pairs(documented: list[Documented]) -> None:
    assert len(documented) > 3000
    for package in ("json.", "numpy.", "torch."):
        assert sum(item.name.startswith(package) for item in documented) > 3
    for item in documented:
        assert 20 <= len(item.summary) <= 200
        assert "\n" not in item.summary and item.summary.isascii()
        assert item.summary[0].isupper() and item.summary[-1] in ".!?"
        assert item.arguments.startswith("(") and item.arguments.endswith(")")
        assert " at 0x" not in item.arguments  # an address differs from run to run


def test_known_pairs(documented: list[Documented]) -> None:
    by_name = {item.name: item for item in documented}
    assert by_name["json.dumps"].summary == "Serialize `obj` to a JSON formatted `str`."
    assert by_name["len"] == ("len", "(obj, /)", "Return the number of items in a container.")
    assert by_name["str.upper"].arguments == "()"
    # Its docstring begins with a signature, and only there are its arguments stated.
    assert by_name["torch.add"].arguments == "(input, other, *, alpha=1, out=None)"
    assert by_name["torch.add"].summary == "Adds `other`, scaled by `alpha`, to `input`."


def test_no_answer_occurs_twice(documented: list[Documented]) -> None:
    assert len({item.name for item in documented}) == len(documented)
    assert len({item.summary.lower() for item in documented}) == len(documented)


def test_splits_are_disjoint_and_complete(tokenizer: PreTrainedTokenizerBase) -> None:
    train = pairs(tokenizer, docstrings(tokenizer))
    held_out = pairs(tokenizer, docstrings(tokenizer, split="validation"))
    assert not train.keys() & held_out.keys()
    assert not set(train.values()) & set(held_out.values())
    assert len(train) + len(held_out) == len(documented_callables(PACKAGES))
    assert 0.08 < len(held_out) / (len(train) + len(held_out)) < 0.12


def test_a_callables_split_does_not_depend_on_the_others(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    alone = pairs(tokenizer, docstrings(tokenizer, packages=["python"], split="validation"))
    all_train = pairs(tokenizer, docstrings(tokenizer))
    assert alone
    assert not alone.keys() & all_train.keys()


def test_limit_takes_the_first_and_the_seed_chooses(tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = docstrings(tokenizer, packages=["python"], limit=50)
    assert dataset == docstrings(tokenizer, packages=["python"])[:50]
    other = docstrings(tokenizer, packages=["python"], limit=50, seed=1)
    assert other != dataset
    # Shuffled: not the alphabet's beginning.
    questions = list(pairs(tokenizer, dataset))
    assert questions != sorted(questions)


SCRIPT = """
import hashlib, sys
from graphtune.data import docstrings
from transformers import AutoTokenizer
dataset = docstrings(AutoTokenizer.from_pretrained(sys.argv[1]), limit=1000)
print(hashlib.sha256(repr(list(dataset)).encode()).hexdigest())
"""


def test_every_process_gets_the_same_and_nothing_is_printed(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    expected = hashlib.sha256(repr(list(docstrings(tokenizer, limit=1000))).encode()).hexdigest()
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == expected


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Return the sum\nof all values. More text.", "Return the sum of all values."),
        ("f(x, y) -> int\n\nReturn the sum of both.", "Return the sum of both."),
        ("Use :func:`a.b` or ``c`` for this", "Use `a.b` or `c` for this."),
        ("Handle suffixes, e.g. one of these.", "Handle suffixes, e.g. one of these."),
        ("return it in lower case.", "Return it in lower case."),
        ("Too short.", None),
        ("Return self+value.", None),
        ("See the other function for it.", None),
        ("Compute :math:`x^2` for all of x.", None),
        ("x = f(y) for every y there is.", None),
        ("", None),
        (None, None),
    ],
)
def test_first_sentence(doc: str | None, expected: str | None) -> None:
    assert first_sentence(doc) == expected


def test_the_public_name_is_the_function() -> None:
    assert callable(graphtune.data.docstrings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "dataset.split: 'test' is unknown; use train or validation"),
        ({"packages": ["numpi"]}, "dataset.packages: 'numpi' is unknown"),
        ({"holdout": 1.5}, "dataset.holdout: 1.5"),
        ({"limit": 0}, "dataset: it holds no examples"),
    ],
)
def test_bad_options_are_refused(
    tokenizer: PreTrainedTokenizerBase, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        docstrings(tokenizer, **options)
