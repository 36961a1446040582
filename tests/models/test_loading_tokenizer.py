"""Meta's `tokenizer.model`, in a folder that says nothing else about it."""

import base64
import io
import json
from pathlib import Path

import pytest
import sentencepiece

from graphtune.errors import UserError
from graphtune.models import load_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "params.json").write_text(json.dumps({"dim": 32}))
    return tmp_path


def test_the_tokenizer_of_llama_3_is_read(checkpoint: Path) -> None:
    ranks = [bytes([value]) for value in range(256)] + [b"th", b"the", b" the"]
    lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate(ranks)]
    (checkpoint / "tokenizer.model").write_bytes(b"\n".join(lines))
    tokenizer = load_tokenizer(checkpoint)
    begin, end = len(ranks), len(ranks) + 1
    assert tokenizer("the the")["input_ids"] == [begin, 257, 258]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (begin, end)
    turn = "<|start_header_id|>user<|end_header_id|><|eot_id|>"
    assert {begin + 6, begin + 7, begin + 9} < set(tokenizer(turn)["input_ids"])


def test_the_tokenizer_of_llama_2_is_read(checkpoint: Path) -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "numbers 12 345 and the rest"] * 9),
        model_writer=written,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    (checkpoint / "tokenizer.model").write_bytes(written.getvalue())
    reference = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    tokenizer = load_tokenizer(checkpoint)
    for text in ("The cat sat", "  two spaces, 12345\n\n lines\r\n", "the thé \U0001f600"):
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)], text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02" * 9, b"\nno pieces", b"no ranks\n"])
def test_a_damaged_tokenizer_is_refused(content: bytes, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="^model.id: .*tokenizer.model") as info:
        load_tokenizer(checkpoint)
    assert "\n" not in str(info.value)
