"""What ExecuTorch's C++ tokenizer makes of a file is told as it is."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graphtune.errors import UserError
from graphtune.export.device_tokenizer import check_tokenizer, describe_parity, write_tokenizer


def bytes_tokenizer(normalizer=None):
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_a_tokenizer_that_both_read_alike(tmp_path):
    parity = write_tokenizer(bytes_tokenizer(), tmp_path)
    assert "error" not in parity and parity["differs"] == {}
    assert describe_parity(parity).endswith("agrees on 5 of 5 texts")
    read = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert read.encode("the fox").ids == bytes_tokenizer()("the fox")["input_ids"]


def test_texts_that_it_reads_otherwise_are_named(tmp_path):
    """It has no such normalizer, or cannot read the file for it."""
    strips = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    parity = write_tokenizer(bytes_tokenizer(strips), tmp_path)
    assert "error" in parity or "accents" in parity["differs"]
    said = describe_parity(parity)
    assert "does not read it" in said or "accents" in said


def test_a_tokenizer_without_a_file():
    with pytest.raises(UserError, match=r"no tokenizer\.json form"):
        check_tokenizer(object(), 300)


def test_a_tokenizer_of_more_tokens_than_the_model():
    tokenizer = bytes_tokenizer()
    largest = max(tokenizer.get_vocab().values())
    check_tokenizer(tokenizer, largest + 1)
    with pytest.raises(UserError, match=f"has the id {largest}, .* vocabulary is {largest}"):
        check_tokenizer(tokenizer, largest)
