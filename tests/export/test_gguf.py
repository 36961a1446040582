"""llama.cpp's own package reads the file back; transformers and llama.cpp run it."""

import importlib
import json
import string

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import graphtune as gt
from graphtune.errors import UserError
from graphtune.export import to_gguf
from graphtune.export.artifact import read_checks, read_manifest
from graphtune.models import load_tokenizer
from graphtune.passes import LoRA, Merge
from tests.oracles.models import _SHAPE, FAMILIES, random_ids, tiny_gpt2, tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CONFIGS = {name: FAMILIES[name] for name in ("llama", "mistral", "qwen2", "qwen3", "phi3")} | {
    "gemma2": FAMILIES["gemma2"],
    "gemma3": lambda: Gemma3TextConfig(
        **{**_SHAPE, "num_hidden_layers": 6}, head_dim=8, query_pre_attn_scalar=8, sliding_window=5
    ),
    "llama3.1": lambda: LlamaConfig(**_SHAPE, rope_parameters=LLAMA3),
    "linear": lambda: Qwen2Config(**_SHAPE, rope_parameters=LINEAR),
}
# What transformers reads from the file is the whole model.
READ_WHOLE = ("llama", "mistral", "qwen2", "phi3")


def tiny(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def programs():
    made = {}

    def program(family):
        if family not in made:
            made[family] = gt.capture(tiny(family))
        return made[family]

    return program


def length_of(family):
    return 6 if family == "mistral" else 17  # its window, which llama.cpp has not


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", READ_WHOLE)
def test_transformers_loads_the_model(family, programs, tmp_path):
    folder = to_gguf(programs(family), tmp_path / "out")
    ids = random_ids(2, length_of(family))
    expected = logits(tiny(family), ids)
    ours = gt.load_model(folder / "model.gguf")
    torch.testing.assert_close(logits(ours, ids), expected, rtol=0, atol=1e-5)
    assert ours.config.max_position_embeddings == (6 if family == "mistral" else 128)
    if family != "mistral":  # a type that llama.cpp has not: such a file is a llama's
        theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
        torch.testing.assert_close(logits(theirs, ids), expected, rtol=0, atol=1e-5)
        assert read_manifest(folder)["not_read_by_transformers"] == []


@pytest.mark.parametrize("family", CONFIGS)
def test_llama_cpp_computes_the_same(family, programs, tmp_path):
    pytest.importorskip("llama_cpp")
    check = importlib.import_module("graphtune.export.gguf_check")
    folder = to_gguf(programs(family), tmp_path / "out")
    ids = random_ids(1, length_of(family), seed=5)
    expected = logits(tiny(family), ids)
    found = check.llama_cpp_logits(folder / "model.gguf", ids)
    # llama.cpp looks GELU up in a table of float16.
    atol = 1e-2 if family.startswith("gemma") else 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "llama3.1", "linear"])
def test_what_transformers_does_not_read_is_named(family, programs, tmp_path):
    folder = to_gguf(programs(family), tmp_path / "out")
    unread = read_manifest(folder)["not_read_by_transformers"]
    expected = {
        "qwen3": ["head_dim"],
        "gemma2": ["attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"],
        "gemma3": ["query_pre_attn_scalar"],
        "llama3.1": ["rope_parameters"],
        "linear": ["rope_parameters"],
    }
    assert unread == expected[family]
    assert read_checks(folder)[0].max_abs_diff < 1e-5
    fields = GGUFReader(folder / "model.gguf").fields
    stated = {
        "qwen3": {"qwen3.attention.key_length": 8},
        "gemma2": {"gemma2.attn_logit_softcapping": 1.5, "gemma2.final_logit_softcapping": 4.0},
        "gemma3": {"gemma3.attention.sliding_window": 5, "gemma3.rope.freq_base_swa": 10000.0},
        "llama3.1": {"llama.rope.freq_base": 10000.0},
        "linear": {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0},
    }[family]
    assert {key: fields[key].contents() for key in stated} == stated


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("f16", GGMLQuantizationType.F16),
        ("bf16", GGMLQuantizationType.BF16),
        ("q8_0", GGMLQuantizationType.Q8_0),
    ],
)
def test_formats_are_those_of_the_gguf_package(format, kind, programs, tmp_path):
    folder = to_gguf(programs("qwen2"), tmp_path / "out", format=format)
    tensors = {t.name: t for t in GGUFReader(folder / "model.gguf").tensors}
    model = tiny("qwen2")
    weight = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    stored = tensors["blk.1.ffn_up.weight"]
    assert stored.tensor_type == kind
    assert (stored.data == gguf.quantize(weight, kind)).all()
    assert tensors["blk.1.attn_norm.weight"].tensor_type == GGMLQuantizationType.F32
    narrow = tensors["blk.1.ffn_down.weight"].tensor_type  # 48 wide: no blocks of 32
    assert narrow == (GGMLQuantizationType.F16 if format == "q8_0" else kind)
    checks = {check.what: check for check in read_checks(folder)}
    loss = checks[f"what {format} loses"]
    assert 1e-5 < loss.max_abs_diff < 0.2 and loss.limit is None


def test_a_bfloat16_model_is_written_as_it_is(tmp_path):
    model = tiny("llama").bfloat16()
    folder = to_gguf(gt.capture(model), tmp_path / "out")
    assert read_manifest(folder)["format"] == "bf16"
    again = gt.load_model(folder / "model.gguf", dtype="bf16")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_file_with_rows_in_another_order_is_not_kept(programs, monkeypatch, tmp_path):
    module = importlib.import_module("graphtune.export.gguf")
    monkeypatch.setattr(module, "_interleave", lambda weight, heads, undo=False: weight)
    with pytest.raises(RuntimeError, match=r"transformers.*disagrees.*nothing was kept"):
        to_gguf(programs("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused(programs, tmp_path):
    def refused(program, message, **options):
        with pytest.raises(UserError, match=message):
            to_gguf(program, tmp_path / "out", **options)
        assert list(tmp_path.iterdir()) == []

    llama, gemma = programs("llama"), programs("gemma2")
    refused(llama.apply(LoRA(rank=2)), "adapters that are not merged")
    refused(llama, "`format=q8`.*did you mean `q8_0`", format="q8")
    refused(gt.capture(tiny_gpt2()), "'gpt2' cannot be written yet; there are: llama")
    head = gemma.apply(LoRA(rank=2, targets=["lm_head"])).apply(Merge())
    refused(head, "ties the output head of gemma2")
    refused(gt.capture(tiny_model("gemma3")), "every 6th layer of gemma3_text")
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    refused(llama, "tokenizer of type WordLevel", tokenizer=words)
    large = PreTrainedTokenizerFast(tokenizer_object=byte_level("gpt-2"))
    refused(llama, "and the model 128 embeddings", tokenizer=large)


# ---------------------------------------------------------------------------- tokenizers

CORPUS = ["the quick brown fox jumps over the lazy dog", "It's 1234 or 56,\n\n  and   so on."] * 5
VOCAB = 360
TEXTS = ["the quick fox's 98765 jumps", "  two   spaces\n\n\tand x = 42;", "naïve 한국 😀"]
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def byte_level(family):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = SPLITS[family]
    backend.normalizer = normalizers.NFC() if family == "qwen2" else None
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 10,
        special_tokens=["<s>", "</s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece_like():
    """As Llama 2's tokenizer.json: spaces are ▁, what is not in the vocabulary falls to bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=90, initial_alphabet=list(string.ascii_letters + "▁"), show_progress=False
    )
    trained.train_from_iterator(CORPUS[::2], trainer)
    model = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [piece for piece in model["vocab"] if piece not in special]
    vocab = {piece: index for index, piece in enumerate([*special, *pieces])}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(special[:3])
    return backend


def wrap(backend):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    config = LlamaConfig(**{**_SHAPE, "vocab_size": VOCAB}, eos_token_id=[1, 2])
    return gt.capture(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("family", [*SPLITS, "sentencepiece"])
def test_the_file_splits_text_as_the_tokenizer(family, wide, tmp_path):
    tokenizer = wrap(sentencepiece_like() if family == "sentencepiece" else byte_level(family))
    path = to_gguf(wide, tmp_path / "out", tokenizer=tokenizer) / "model.gguf"
    fields = GGUFReader(path).fields
    pre = "default" if family == "sentencepiece" else family
    assert fields["tokenizer.ggml.pre"].contents() == pre
    stops = {fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")}
    assert stops == {1, 2}
    assert len(fields["tokenizer.ggml.tokens"].contents()) == VOCAB
    read = load_tokenizer(path)
    assert read.chat_template == tokenizer.chat_template
    assert (read.bos_token, read.eos_token) == ("<s>", "</s>")
    for text in TEXTS:
        if family == "sentencepiece" and text.startswith(" "):
            continue  # transformers reads the file as Metaspace, which puts no ▁ before one
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert read(text, add_special_tokens=False).input_ids == expected
        assert tokenizer.decode(expected).strip() == text.strip()


@pytest.mark.parametrize("family", [*SPLITS, "sentencepiece"])
def test_llama_cpp_splits_text_as_the_tokenizer(family, wide, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = wrap(sentencepiece_like() if family == "sentencepiece" else byte_level(family))
    path = to_gguf(wide, tmp_path / "out", tokenizer=tokenizer) / "model.gguf"
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in TEXTS:
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert model.tokenize(text.encode(), add_bos=False) == expected, text
    assert (model.token_bos(), model.token_eos()) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
