"""The tokenizer beside a `.pte`, and whether ExecuTorch's own reader of it finds the same tokens.

Devices read `tokenizer.json` with the C++ tokenizer of `pytorch_tokenizers`, which knows fewer
normalizers and splitters than the library that wrote the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer.json"

# What tokenizers were seen to differ on.
_TEXTS = {
    "English": "The quick brown fox jumps over the lazy dog, and the dog doesn't mind it at all.",
    "accents": "Crème brûlée à Zürich, año, naïve",
    "spaces": "def f(x):\n    return  x\t+ 1\n\n\nf( 2 )   ",
    "digits": "In 2024: 3.14159, 1,000,000 and 0x7fff.",
    "scripts": "北京 東京 Привет مرحبا 😀",
}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> None:
    """Raise UserError if a tokenizer has no file for devices, or is of another model."""
    if tokenizer is None:
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"to_executorch: a {type(tokenizer).__name__} has no tokenizer.json form, which the "
            "device reads; load a fast tokenizer, or pass no tokenizer"
        )
    # Tokens that were added may lie beyond: Gemma 3's has one for images.
    largest = max(backend.get_vocab(with_added_tokens=False).values(), default=-1)
    special = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if (largest := max(largest, *special, -1)) >= vocab_size:
        raise UserError(
            f"to_executorch: the tokenizer has the id {largest}, and the model's vocabulary is "
            f"{vocab_size}; pass the tokenizer that the model was trained with"
        )


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """Write `tokenizer.json`, and read a few texts with ExecuTorch's C++ tokenizer.

    Returns:
        For the manifest: `reader`, its package; `texts`, the number of texts; `differs`, by the
        name of a text what the reader made of it, ids or its error, and what was right; `error`,
        if it did not read the file at all, or is not there.
    """
    path = folder / TOKENIZER
    path.write_text(tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    parity: dict[str, Any] = {"reader": "pytorch_tokenizers", "texts": len(_TEXTS), "differs": {}}
    try:
        from pytorch_tokenizers import CppHFTokenizer

        reader = CppHFTokenizer()
        reader.load(str(path))
        for name, text in _TEXTS.items():
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            if (found := _encode(reader, text)) != expected:
                differing = {"text": text, "found": found, "expected": expected}
                parity["differs"][name] = differing
    except (ImportError, RuntimeError, ValueError) as error:
        parity["error"] = str(error).strip().partition("\n")[0]
    return parity


def _encode(reader: Any, text: str) -> list[int] | str:
    try:
        return list(reader.encode(text, 0, 0))
    except RuntimeError as error:
        return str(error)


def describe_parity(parity: dict[str, Any] | None) -> str:
    """One line for the console."""
    if parity is None:
        return "no tokenizer beside"
    if "error" in parity:
        return f"{TOKENIZER}: ExecuTorch's C++ tokenizer does not read it: {parity['error']}"
    differs, texts = parity["differs"], parity["texts"]
    if not differs:
        return f"{TOKENIZER}: ExecuTorch's C++ tokenizer agrees on {texts} of {texts} texts"
    return (
        f"{TOKENIZER}: ExecuTorch's C++ tokenizer gives other tokens for {', '.join(differs)} "
        f"({len(differs)} of {texts} texts; manifest.json has them); tokenize such text elsewhere"
    )
