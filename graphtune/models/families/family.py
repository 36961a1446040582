"""What a model family is: a function from a config to options, and the sizes it is published in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import AutoConfig, PretrainedConfig

from graphtune.models.transformer import DecoderOptions


class Size(NamedTuple):
    """A published model.

    Attributes:
        parameters: how many, a tied one counted once.
        shapes: what its config says of shapes; the rest (bases, scalings, tokens) is read with the
            checkpoint.
    """

    parameters: int
    shapes: Mapping[str, Any]


def shapes(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    """What most configs say of shapes; `more` is what is not a Llama's."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    } | more


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: `config.model_type` of its checkpoints.
        read: what a config means; raises UserError where the decoder cannot do it.
        sizes: what is published, by hub id. A model that was trained further (`-Instruct`) has the
            size of its base.
    """

    model_type: str
    read: Callable[[PretrainedConfig], DecoderOptions]
    sizes: Mapping[str, Size]

    def config(self, id: str) -> PretrainedConfig:
        """A config with the shapes of a published model."""
        return AutoConfig.for_model(self.model_type, **self.sizes[id].shapes)
