"""From rows to batches: sources, conversations, chat templates, packing, collation.

A source takes a tokenizer and returns a `Dataset` of examples (or, streaming, a
`StreamingDataset`). Any function of that form can be a config's `dataset: {_component_: ...}`.
"""

from graphtune.data.batching import Batching, Plan, plan
from graphtune.data.builders import (
    ChatOptions,
    EncodeOptions,
    alpaca,
    chat,
    instruct,
    preference,
    questions,
    stepwise,
    text,
    unpaired,
)
from graphtune.data.catalog import (
    alpaca_cleaned,
    cnn_dailymail,
    grammar,
    gsm8k,
    hh_rlhf_helpful,
    samsum,
    slimorca,
    stack_exchange_paired,
    wikitext,
)
from graphtune.data.collation import Batch, collate, collate_packed, complete, count_tokens
from graphtune.data.conversations import ConversationEncoder
from graphtune.data.dataset import IGNORE_INDEX, Dataset, Example
from graphtune.data.encoding import encode_rows
from graphtune.data.images import open_image
from graphtune.data.library_docs import docstrings, pydoc_topics
from graphtune.data.loader import Loader
from graphtune.data.messages import Conversation, Message
from graphtune.data.mixture import mix
from graphtune.data.packing import Pack, pack
from graphtune.data.rows import RowOptions, Rows, read_rows
from graphtune.data.streaming import StreamingDataset
from graphtune.data.vision import VisionEncoder

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Batching",
    "ChatOptions",
    "Conversation",
    "ConversationEncoder",
    "Dataset",
    "EncodeOptions",
    "Example",
    "Loader",
    "Message",
    "Pack",
    "Plan",
    "RowOptions",
    "Rows",
    "StreamingDataset",
    "VisionEncoder",
    "alpaca",
    "alpaca_cleaned",
    "chat",
    "cnn_dailymail",
    "collate",
    "collate_packed",
    "complete",
    "count_tokens",
    "docstrings",
    "encode_rows",
    "grammar",
    "gsm8k",
    "hh_rlhf_helpful",
    "instruct",
    "mix",
    "open_image",
    "pack",
    "plan",
    "preference",
    "pydoc_topics",
    "questions",
    "read_rows",
    "samsum",
    "slimorca",
    "stack_exchange_paired",
    "stepwise",
    "text",
    "unpaired",
    "wikitext",
]
