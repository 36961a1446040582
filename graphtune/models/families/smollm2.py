"""SmolLM2: a small Llama."""

from typing import Any

from graphtune.models.families import llama
from graphtune.models.families.family import Family, Size


def _shapes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    return {
        "vocab_size": 49152,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": True,
    }


FAMILY = Family(
    "llama",
    llama.read,
    {
        "HuggingFaceTB/SmolLM2-135M": Size(134_515_008, _shapes(576, 1536, 30, 9, 3)),
        "HuggingFaceTB/SmolLM2-360M": Size(361_821_120, _shapes(960, 2560, 32, 15, 5)),
        "HuggingFaceTB/SmolLM2-1.7B": Size(1_711_376_384, _shapes(2048, 8192, 24, 32, 32)),
    },
)
