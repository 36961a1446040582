"""Plain text to measure what a model still knows: no template, every token predicted."""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics

from transformers import PreTrainedTokenizerBase

from graphtune.data.dataset import IGNORE_INDEX, Dataset, Example
from graphtune.errors import UserError

_SHORTEST = 16  # tokens; the rest of a document that is shorter says little about a model


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
    if max_length < _SHORTEST:
        raise UserError(f"dataset.max_length: {max_length} is too short; use {_SHORTEST} or more")
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
        if len(piece) >= _SHORTEST:
            yield Example(input_ids=piece, labels=[IGNORE_INDEX, *piece[1:]])
