"""SmolLM2: a small Llama."""

from graphtune.models.families import llama
from graphtune.models.families.family import Family, Size, shapes

FAMILY = Family(
    "llama",
    llama.read,
    {
        "HuggingFaceTB/SmolLM2-135M": Size(
            134_515_008, shapes(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True)
        ),
        "HuggingFaceTB/SmolLM2-360M": Size(
            361_821_120, shapes(49152, 960, 2560, 32, 15, 5, tie_word_embeddings=True)
        ),
        "HuggingFaceTB/SmolLM2-1.7B": Size(
            1_711_376_384, shapes(49152, 2048, 8192, 24, 32, 32, tie_word_embeddings=True)
        ),
    },
)
