"""Data from the documentation of installed libraries: real, and no download.

`pydoc_topics` is prose. `docstrings` are pairs: each asks what a documented callable does, and
answers with the first sentence of its docstring:

    What does `json.dumps(obj, *, skipkeys=False, ...)` do?
    Serialize `obj` to a JSON formatted `str`.

The data follow the installed versions of Python, numpy and torch.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from graphtune.data.conversations import ConversationEncoder
from graphtune.data.dataset import IGNORE_INDEX, Dataset, Example
from graphtune.data.formats import conversation
from graphtune.errors import UserError

# Modules whose import does nothing but define things. Left out: those that open a window or a
# browser, print, are deprecated, or exist on one platform only.
MODULES = {
    "python": """
        builtins abc argparse array ast asyncio base64 bdb binascii bisect bz2 calendar cmath cmd
        code codecs collections collections.abc colorsys compileall concurrent.futures configparser
        contextlib contextvars copy copyreg csv ctypes dataclasses datetime decimal difflib dis
        doctest email.message email.utils email.policy email.headerregistry enum filecmp fileinput
        fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib
        heapq hmac html html.parser http.client http.cookiejar http.cookies http.server imaplib
        importlib importlib.abc importlib.machinery importlib.metadata importlib.resources
        importlib.util inspect io ipaddress itertools json keyword linecache locale logging
        logging.config logging.handlers lzma mailbox marshal math mimetypes mmap modulefinder
        multiprocessing.managers multiprocessing.pool multiprocessing.shared_memory netrc numbers
        operator optparse os os.path pathlib pdb pickle pickletools pkgutil platform plistlib
        poplib pprint profile pstats py_compile pyclbr pydoc queue quopri random re reprlib runpy
        sched secrets selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3
        ssl stat statistics string stringprep struct subprocess symtable sys sysconfig tabnanny
        tarfile tempfile textwrap threading time timeit token tokenize tomllib trace traceback
        tracemalloc types typing unicodedata unittest unittest.mock urllib.error urllib.parse
        urllib.request urllib.robotparser uuid venv warnings wave weakref wsgiref.handlers
        wsgiref.headers wsgiref.util wsgiref.validate xml.dom.minidom xml.dom.pulldom
        xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils xml.sax.xmlreader
        xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
    """,
    "numpy": """
        numpy numpy.char numpy.fft numpy.lib.array_utils numpy.lib.format numpy.lib.npyio
        numpy.lib.scimath numpy.lib.stride_tricks numpy.linalg numpy.ma numpy.polynomial
        numpy.polynomial.chebyshev numpy.polynomial.hermite numpy.polynomial.hermite_e
        numpy.polynomial.laguerre numpy.polynomial.legendre numpy.polynomial.polynomial
        numpy.random numpy.rec numpy.strings numpy.testing
    """,
    "torch": """
        torch torch.amp torch.autograd torch.autograd.functional torch.autograd.graph
        torch.autograd.profiler torch.compiler torch.cpu torch.cuda torch.distributions
        torch.distributions.constraints torch.distributions.transforms torch.fft torch.func torch.fx
        torch.hub torch.library torch.linalg torch.multiprocessing torch.nested torch.nn
        torch.nn.functional torch.nn.init torch.nn.parallel torch.nn.utils torch.nn.utils.prune
        torch.nn.utils.rnn torch.optim torch.optim.lr_scheduler torch.optim.swa_utils
        torch.overrides torch.profiler torch.random torch.serialization torch.signal.windows
        torch.sparse torch.special torch.testing torch.utils.checkpoint torch.utils.data
        torch.utils.dlpack torch.utils.hooks
    """,
}

SPLITS = ("train", "validation")
_ARGUMENTS_LIMIT = 100  # characters; longer ones are written (...)
_SENTENCE_LIMITS = (20, 200)  # characters
_SHORTEST_CHUNK = 16  # tokens; the rest of a document that is shorter says little about a model

_BOILERPLATE = re.compile(
    r"Return self|Return key|Implement |Initialize self|See |Alias|Same as|Deprecated|Internal|"
    r"Undocumented|Return an iterator over self|Helper for pickle|Special case|This is deprecated|"
    r"(This|Added|New|Changed) .*version|A callback|Create a new instance of|Override",
    re.IGNORECASE,
)
_NOT_PROSE = re.compile(
    r"::|>>>|->| = |\||\\|https?:|:math:|TODO|XXX|\.\. |__\w+__ is|[^\x20-\x7e]"
)
_CALL_LINE = re.compile(r"[\w.]+\s*\(.*")
_ROLE = re.compile(r":(?!math)[a-z:]+:`[~!]?\.?([^`<]+?)(?:\s*<[^`]*>)?`")
_TYPED_TENSOR = re.compile(r"\w+(Tensor|Storage)$")  # torch.BoolTensor: Tensor's methods again
_SENTENCE = re.compile(r".+?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!cf)(?<!vs)[.!?](?=\s+[A-Z`\"'(]|\s*$)")


class Documented(NamedTuple):
    """A callable by its qualified name, its arguments as text, and what it does."""

    name: str
    arguments: str
    summary: str


def docstrings(
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    packages: Sequence[str] = ("python", "numpy", "torch"),
    seed: int = 0,
    holdout: float = 0.1,
    limit: int | None = None,
    system: str | None = None,
    max_length: int | None = None,
) -> Dataset:
    """What installed callables do, by their docstrings; only the answer is trained.

    A callable belongs to a split by the hash of its qualified name, so the splits stay disjoint
    whatever is installed, and no answer occurs twice. Order and content depend on nothing but
    the arguments and the installed versions.

    Args:
        tokenizer: the model's, with a chat template.
        split: `train` or `validation`.
        packages: any of `python` (the standard library), `numpy`, `torch`.
        seed: chooses split and order.
        holdout: fraction of the callables that are in `validation`.
        limit: use this many of the split's pairs at most.
        system: a system message before each question; None leaves it to the template.
        max_length: longer examples are cut at the end, in tokens.

    Raises:
        UserError: unknown split or package, a holdout outside 0..1, or nothing left.
    """
    if split not in SPLITS:
        raise UserError(f"dataset.split: {split!r} is unknown; use {' or '.join(SPLITS)}")
    if not 0 <= holdout <= 1:
        raise UserError(f"dataset.holdout: {holdout} is no fraction; use 0 to 1")

    def place(item: Documented) -> float:
        digest = hashlib.sha256(f"{seed}:{item.name}".encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64

    chosen = [
        item
        for item in sorted(documented_callables(packages), key=place)
        if (place(item) < holdout) == (split == "validation")
    ]
    encode = ConversationEncoder(tokenizer)
    examples = (
        encode(conversation(f"What does `{item.name}{item.arguments}` do?", item.summary, system))
        for item in chosen[:limit]
    )
    return Dataset.build(examples, max_length=max_length)


def documented_callables(packages: Sequence[str]) -> list[Documented]:
    """Public callables of `packages` with a one-sentence summary, each summary once.

    Raises:
        UserError: a package that is not in `MODULES`.
    """
    unknown = [package for package in packages if package not in MODULES]
    if unknown:
        raise UserError(f"dataset.packages: {unknown[0]!r} is unknown; use {', '.join(MODULES)}")
    found: dict[str, Documented] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of what we only look at
        for package in packages:
            for name, obj, is_method in _callables(package):
                summary = first_sentence(obj.__doc__)
                if summary is not None:
                    key = re.sub(r"\W", "", summary).lower()
                    found.setdefault(key, Documented(name, _arguments(obj, is_method), summary))
    return list(found.values())


def first_sentence(doc: str | None) -> str | None:
    """The first sentence of a docstring as one line of plain prose; None if it has none."""
    if not isinstance(doc, str):
        return None
    lines = inspect.cleandoc(doc).splitlines()
    while lines and (not lines[0].strip() or _CALL_LINE.match(lines[0])):
        lines.pop(0)  # C functions begin with their signature
    paragraph = "\n".join(lines).split("\n\n")[0]
    text = _ROLE.sub(r"`\1`", " ".join(paragraph.split())).replace("``", "`")
    match = _SENTENCE.match(text)
    sentence = match[0] if match else text.rstrip(" ;,") + "."
    shortest, longest = _SENTENCE_LIMITS
    if (
        not shortest <= len(sentence) <= longest
        or len(sentence.split()) < 4
        or not sentence[0].isalpha()
        or sentence.endswith(":.")
        or sentence.count("`") % 2
        or _BOILERPLATE.match(sentence)
        or _NOT_PROSE.search(sentence)
    ):
        return None
    return sentence[0].upper() + sentence[1:]


def _callables(package: str) -> Iterator[tuple[str, Any, bool]]:
    """A package's public functions, classes and methods: name, object, whether it is a method."""
    for module_name in MODULES[package].split():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # not in this version, or not on this platform
            continue
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for name in _public_names(module):
            obj = getattr(module, name, None)
            if not callable(obj) or not _is_from(obj, package) or _TYPED_TENSOR.match(name):
                continue
            yield f"{prefix}{name}", obj, False
            if inspect.isclass(obj) and not issubclass(obj, BaseException):
                for method_name, method in sorted(vars(obj).items()):
                    if not method_name.startswith("_") and inspect.isroutine(method):
                        yield f"{prefix}{name}.{method_name}", getattr(obj, method_name), True


def _public_names(module: ModuleType) -> list[str]:
    declared = getattr(module, "__all__", None)
    if declared is not None:
        return sorted(name for name in declared if not name.startswith("_"))
    # Without __all__, what a module imported from elsewhere is not its own; what is implemented
    # in C belongs to a private module.
    origins = {
        name: getattr(obj, "__module__", None) or module.__name__
        for name, obj in vars(module).items()
        if not name.startswith("_")
    }
    return sorted(
        name
        for name, origin in origins.items()
        if origin == module.__name__ or origin.startswith(("_", "torch._C"))
    )


def _is_from(obj: Any, package: str) -> bool:
    root = (getattr(obj, "__module__", None) or "builtins").partition(".")[0]
    return root in sys.stdlib_module_names if package == "python" else root in (package, "builtins")


def _arguments(obj: Any, is_method: bool) -> str:
    """`(a, b=1, *, key=None)`, without annotations and `self`; `(...)` where unknown or long."""
    try:
        signature = str(inspect.signature(obj))
    except (ValueError, TypeError):  # C functions may state theirs in the docstring only
        call = _CALL_LINE.match(inspect.cleandoc(obj.__doc__))
        signature = call[0][call[0].index("(") :] if call else ""
    try:
        function = ast.parse(f"def f{signature}: ...").body[0]
        assert isinstance(function, ast.FunctionDef)
    except SyntaxError:  # a default without a literal form, or a signature in prose
        return "(...)"
    arguments = function.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    text = ast.unparse(arguments)
    if is_method:
        text = re.sub(r"^self(, /)?(, |$)", "", text)
    return f"({text})" if len(text) <= _ARGUMENTS_LIMIT else "(...)"


def pydoc_topics(
    tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512, limit: int | None = None
) -> Dataset:
    """The Python language reference, from the standard library: English prose, no download.

    Args:
        tokenizer: the model's.
        max_length: documents are cut into chunks of this many tokens; a last chunk of fewer
            than 16 tokens is left out.
        limit: use this many chunks at most, spread evenly over the documents.

    Raises:
        UserError: `max_length` is too short, or `limit` leaves nothing.
    """
    if max_length < _SHORTEST_CHUNK:
        raise UserError(
            f"dataset.max_length: {max_length} is too short; use {_SHORTEST_CHUNK} or more"
        )
    chunks = [
        chunk
        for _, text in sorted(topics.items())
        for chunk in _chunks(tokenizer, text, max_length)
    ]
    if limit is not None:
        limit = min(limit, len(chunks))
        chunks = [chunks[i * len(chunks) // limit] for i in range(limit)]
    return Dataset.build(chunks, max_length=None)


def _chunks(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Iterator[Example]:
    """Consecutive pieces of `text`, each with the token in front that the tokenizer puts there."""
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    opening = tokenizer.encode("x")[:1]
    opening = opening if opening == [tokenizer.bos_token_id] else []
    step = length - len(opening)
    for start in range(0, len(ids), step):
        piece = opening + ids[start : start + step]
        if len(piece) >= _SHORTEST_CHUNK:
            yield Example(input_ids=piece, labels=[IGNORE_INDEX, *piece[1:]])
