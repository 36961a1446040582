"""Generation: answer prompts with a program, one token after the other."""

from graphtune.generation.decoding import CachedDecoder, Decoder, WholeDecoder, decoder_of
from graphtune.generation.generate import Token, generate
from graphtune.generation.prompts import encode_chat, encode_messages, stop_ids
from graphtune.generation.sampling import Sampling
from graphtune.generation.streaming import TextStream

__all__ = [
    "CachedDecoder",
    "Decoder",
    "Sampling",
    "TextStream",
    "Token",
    "WholeDecoder",
    "decoder_of",
    "encode_chat",
    "encode_messages",
    "generate",
    "stop_ids",
]
