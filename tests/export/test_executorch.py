"""Without a cache the file computes what transformers computes, ExecuTorch's own runner can drive
it, and a file that fails either is not kept."""

import hashlib
import importlib
import json
import shutil
import string
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import graphtune as gt
from graphtune.errors import UserError
from graphtune.export import to_executorch
from graphtune.export.xnnpack import XnnpackForms
from graphtune.passes import LoRA, Merge
from tests.oracles.models import FAMILIES, MIXTURES, random_ids, tiny_gpt2, tiny_model

MAX_SEQ_LEN = 24
LAYERS = 2
VOCAB = 80
# Resolved only if these tests run: executorch is an optional dependency.
executorch = importlib.import_module("executorch.runtime")
module = importlib.import_module("graphtune.export.executorch")


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE, which ExecuTorch's C++ tokenizer reads too."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=list(string.ascii_letters + string.digits),
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def tiny_llama(tokenizer, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=[1, 7],
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)  # or errors would round away
    return model.train()


@pytest.fixture(scope="module")
def program(tokenizer):
    """As a training run leaves it: adapted, then merged."""
    adapted = gt.capture(tiny_llama(tokenizer)).apply(LoRA(rank=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) / 4)
    return adapted.apply(Merge()).train()


def whole(program, folder, **options):
    return to_executorch(program, folder, kv_cache=False, max_seq_len=MAX_SEQ_LEN, **options)


def describe(program):
    return {
        name: (parameter, parameter.requires_grad, parameter.detach().clone())
        for name, parameter in program.all_parameters().items()
    }


@pytest.fixture(scope="module")
def snapshot(program):
    """The program before it was exported."""
    return describe(program)


@pytest.fixture(scope="module")
def report(snapshot, program, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    return whole(program, folder, tokenizer=tokenizer)


@pytest.fixture
def forward(report):
    method = executorch.Runtime.get().load_program(report.path).load_method("forward")
    return lambda ids: method.execute([ids])[0]


@pytest.fixture
def merged_transformers_model(program, tokenizer):
    model = tiny_llama(tokenizer, seed=1)
    model.load_state_dict(program.state_dict())
    return model.eval()


@pytest.fixture
def lower_to(monkeypatch):
    """Replaces the slow lowering by a file that is there already."""

    def replace(path):
        def lower(call, partial, *_):
            shutil.copy(path, partial)
            return 1, {}

        monkeypatch.setattr(module, "lower", lower)

    return replace


@pytest.mark.parametrize("length", [1, 2, 9, MAX_SEQ_LEN])
def test_the_file_gives_the_logits_of_transformers(length, forward, merged_transformers_model):
    ids = random_ids(1, length) % VOCAB
    with torch.no_grad():
        expected = merged_transformers_model(input_ids=ids, use_cache=False).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(forward(ids), expected, rtol=0, atol=1e-4)


def test_the_file_refuses_more_tokens_than_it_has_memory_for(forward):
    with pytest.raises(RuntimeError):
        forward(random_ids(1, MAX_SEQ_LEN + 1) % VOCAB)


def test_every_matrix_product_runs_in_xnnpack(report):
    per_layer = 7  # q, k, v, o, gate, up, down
    assert report.coverage["aten_linear_default"] == (per_layer * LAYERS + 1, 0)
    assert report.coverage["aten_bmm_default"] == (2 * LAYERS, 0)
    assert report.coverage["aten__softmax_default"] == (LAYERS, 0)
    assert report.delegates > 0
    assert "alloc" not in report.coverage
    assert report.delegated_nodes == sum(inside for inside, _ in report.coverage.values())


def test_the_report_measures(report, program):
    assert report.size_bytes == report.path.stat().st_size
    assert 0 < report.max_abs_diff < 1e-4
    assert report.max_abs_logit > 1
    assert report.lowering_s > 0 and report.load_s > 0 and report.prefill_tokens_per_s > 0
    weights = 4 * sum(parameter.numel() for parameter in program.parameters())
    embedding = 4 * program.config.vocab_size * program.config.hidden_size
    # A tied embedding is there twice: the lookup is no operator of XNNPACK, the head is.
    assert weights + embedding <= report.size_bytes < 1.1 * (weights + embedding) + 100_000


def test_the_program_is_left_as_it_was(snapshot, report, program):
    assert program.training
    after = describe(program)
    assert after.keys() == snapshot.keys()
    for name, (parameter, trainable, values) in snapshot.items():
        assert after[name][0] is parameter
        assert after[name][1] == trainable
        assert torch.equal(after[name][2], values)


def test_the_metadata_is_what_the_llm_runner_asks_for(report, tokenizer):
    loaded = executorch.Runtime.get().load_program(report.path)
    constants = {
        name: loaded.load_method(name).execute([]) for name in loaded.method_names - {"forward"}
    }
    assert constants == {
        "get_bos_id": [0],
        "get_eos_ids": [1, 7],
        "get_max_context_len": [MAX_SEQ_LEN],
        "get_max_seq_len": [MAX_SEQ_LEN],
        "get_vocab_size": [VOCAB],
        "enable_dynamic_shape": [True],
        "use_kv_cache": [False],
        "use_sdpa_with_kv_cache": [False],
    }


def test_executorchs_llm_runner_generates_the_same_tokens(
    report, tokenizer, merged_transformers_model
):
    runner = importlib.import_module("executorch.extension.llm.runner")
    prompt, new = "the quick brown", 6
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = merged_transformers_model.generate(
        ids, max_new_tokens=new, do_sample=False, pad_token_id=1
    )
    pieces = []
    config = runner.GenerationConfig(max_new_tokens=new, temperature=0.0, echo=False)
    runner.TextLLMRunner(str(report.path), str(report.path.with_name("tokenizer.json"))).generate(
        prompt, config, token_callback=pieces.append
    )
    assert "".join(pieces) == tokenizer.decode(expected[0, ids.shape[1] :])


def test_the_manifest_fingerprints_the_files(report):
    folder = report.path.parent
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"].keys() == {"model.pte", "tokenizer.json"}
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "manifest.json"}


def test_a_file_that_disagrees_is_not_kept(report, tokenizer, lower_to, tmp_path):
    lower_to(report.path)
    earlier = tmp_path / "out"
    shutil.copytree(report.path.parent, earlier)
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    other = gt.capture(tiny_llama(tokenizer, seed=2))
    with pytest.raises(RuntimeError, match=r"a logit differs by \d.*tolerance 0.0001"):
        whole(other, earlier, overwrite=True)
    assert list(tmp_path.iterdir()) == [earlier]
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before


@pytest.mark.slow
def test_a_matrix_product_outside_xnnpack_is_refused(program, monkeypatch, tmp_path):
    from executorch.backends.xnnpack.partition.config import AddConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    adds = XnnpackPartitioner(configs=[AddConfig])
    monkeypatch.setattr(module, "partitioners", lambda backend: [adds])
    with pytest.raises(UserError, match=rf"{7 * LAYERS + 1} matrix products with a weight"):
        whole(program, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", [*sorted(set(FAMILIES) - set(MIXTURES)), "gpt2"])
def test_other_families_agree_with_transformers(family, tmp_path):
    model = tiny_gpt2() if family == "gpt2" else tiny_model(family)
    made = whole(gt.capture(model), tmp_path)
    method = executorch.Runtime.get().load_program(made.path).load_method("forward")
    ids = random_ids(1, 17)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(method.execute([ids])[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.ones(7, 7, dtype=torch.bool).tril()[None, None]},
        {"attn_mask": torch.randn(1, 4, 7, 7), "scale": 0.3},
        {"is_causal": True},
        {},
    ],
    ids=["bool mask", "float mask", "causal", "full"],
)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_plain_attention_is_attention(options, key_heads):
    query, key, value = (torch.randn(1, heads, 7, 8) for heads in (4, key_heads, key_heads))
    options = {**options, "enable_gqa": key_heads != 4}
    expected = scaled_dot_product_attention(query, key, value, **options)
    with XnnpackForms():
        found = scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_is_gelu(approximate):
    x = torch.linspace(-6, 6, 1001)
    expected = gelu(x.double(), approximate=approximate).float()
    with XnnpackForms():
        found = gelu(x, approximate=approximate)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_weights_must_be_float32(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"bfloat16.*load the model with dtype=float32"):
        to_executorch(tiny_llama(tokenizer).bfloat16(), tmp_path, max_seq_len=8)


@pytest.mark.parametrize("length", [1, 65])
def test_the_length_must_suit_the_model(length, program, tmp_path):
    with pytest.raises(UserError, match=f"`max_seq_len={length}` must be .* at most .* 64"):
        to_executorch(program, tmp_path, max_seq_len=length)


def test_the_tokenizer_must_have_a_json_form(program, tmp_path):
    with pytest.raises(UserError, match="tokenizer.json"):
        to_executorch(program, tmp_path, max_seq_len=8, tokenizer=object())


def test_without_executorch_the_error_says_what_to_install(program, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(UserError, match=r"pip install 'graphtune\[executorch\]'"):
        to_executorch(program, tmp_path)


def test_importing_the_package_imports_no_executorch():
    code = (
        "import sys, graphtune.export as e; e.to_hf; e.to_executorch; "
        "assert not [m for m in sys.modules if m.split('.')[0] == 'executorch']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
