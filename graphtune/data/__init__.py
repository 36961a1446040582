"""From text to batches: sources, chat templates, packing, collation.

A source takes a tokenizer and returns a `Dataset`, a list of `{"input_ids", "labels"}`. Any
function of that form can be a config's `dataset: {_component_: ...}`.
"""

from graphtune.data.collation import Batch, collate, collate_packed, count_tokens
from graphtune.data.conversations import ConversationEncoder
from graphtune.data.dataset import IGNORE_INDEX, Dataset, Example
from graphtune.data.library_docs import docstrings
from graphtune.data.loader import batches, count_batches
from graphtune.data.packing import Pack, pack
from graphtune.data.prose import pydoc_topics
from graphtune.data.tabular import alpaca, chat, instruct

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "ConversationEncoder",
    "Dataset",
    "Example",
    "Pack",
    "alpaca",
    "batches",
    "chat",
    "collate",
    "collate_packed",
    "count_batches",
    "count_tokens",
    "docstrings",
    "instruct",
    "pack",
    "pydoc_topics",
]
