"""Pieces of streamed text add up to the text of all ids, whatever bytes the ids are."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graphtune.generation import TextStream

TEXT = "Grüße aus Köln! 日本語のテキスト。 Привет, мир. 👩‍👩‍👧‍👦 🏳️‍🌈 a  b\n\n\tend …"


def byte_level():
    """As GPT-2, Llama 3 and Qwen have it: tokens are bytes, most characters several of them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    backend.train_from_iterator([TEXT, "the end of the text"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def byte_fallback():
    """As Llama 2 and Gemma have it: a space is a mark that a text's first token loses."""
    vocab = {"<unk>": 0, "</s>": 1}
    vocab |= {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for word in ["▁", "▁the", "▁end", "end", "▁Grü", "ß", "e", "!", "▁日本", "語"]:
        vocab.setdefault(word, len(vocab))
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback}


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def random_bytes(tokenizer, draw):
    """Mostly no valid text: halves of characters, in any order."""
    return [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(40))]


def random_characters(tokenizer, draw):
    """Words, and characters of several bytes. (A decoder with byte fallback gives up all bytes in a
    row if one of them is wrong, also those that were right when they came.)"""
    ids = []
    for _ in range(draw.randrange(20)):
        character = draw.choice(TEXT).encode()
        word = [draw.randrange(258, len(tokenizer))]
        ids += draw.choice([word, [2 + byte for byte in character], [1]])
    return ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_add_up_to_the_text(kind):
    tokenizer = TOKENIZERS[kind]()
    draw = random.Random(0)
    make = random_bytes if kind == "byte_level" else random_characters
    cases = [make(tokenizer, draw) for _ in range(80)]
    if kind == "byte_level":
        cases.append(tokenizer.encode(TEXT))
    for ids in cases:
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in ids]
        pieces.append(stream.finish())
        assert "".join(pieces) == stream.text == decoded(tokenizer, ids)


def test_no_piece_has_half_a_character():
    tokenizer = byte_level()
    ids = tokenizer.encode(TEXT)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 20
    assert stream.text == TEXT


def test_text_is_decoded_in_pieces_of_bounded_length():
    """Or an answer of n tokens would take n * n of work."""
    tokenizer = byte_level()
    longest = 0

    class Counting:
        def decode(self, ids, **options):
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids, **options)

    stream = TextStream(Counting())
    for token in tokenizer.encode(TEXT) * 5:
        stream.push(token)
    assert longest <= 16


@pytest.mark.parametrize("stops", [["end"], ["xyz", "mir. "], ["。 П", "Köln"], ["nowhere"], ["…"]])
def test_text_ends_before_a_stop_string(stops):
    tokenizer = byte_level()
    stream, pieces = TextStream(tokenizer, stops), []
    for token in tokenizer.encode(TEXT):
        pieces.append(stream.push(token))
        # Nothing is shown that a stop string might begin with.
        assert not any(stream.text.endswith(stop[:1]) and stop[:2] in TEXT for stop in stops)
        if stream.stopped:
            break
    pieces.append(stream.finish())
    places = [TEXT.find(stop) for stop in stops if stop in TEXT]
    assert stream.stopped == bool(places)
    assert "".join(pieces) == TEXT[: min(places, default=len(TEXT))]


def test_what_looked_like_a_stop_string_is_shown_at_the_end():
    tokenizer = byte_level()
    stream = TextStream(tokenizer, ["the end!!"])
    for token in tokenizer.encode("this is the end"):
        stream.push(token)
    assert stream.text == "this is "
    assert stream.finish() == "the end" and not stream.stopped
