"""Ids and options of load_model, load_tokenizer and load_config."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import graphtune as gt
from graphtune.errors import UserError
from graphtune.models import load_config, load_model, load_tokenizer
from graphtune.models.dtypes import fast_dtype, resolve_dtype
from graphtune.models.transformer import Transformer
from tests.oracles.models import assert_same_tensors, tiny_model


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """What the CPU can do: nothing of bfloat16, whatever machine this is."""
    capabilities = {"avx512_bf16": True, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    return capabilities


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bfloat16 Llama with a tokenizer, as save_pretrained writes them."""
    path = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    vocabulary = {"</s>": 0} | {chr(97 + i): i + 1 for i in range(26)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(path)
    return path


def test_a_folder_loads_ready_for_capture(folder: Path) -> None:
    model = load_model(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.training
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "sdpa"
    assert model.graphtune_source == str(folder)
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", torch.float32),  # the checkpoint is bfloat16, which is slow here
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp32", torch.float32),
        ("float32", torch.float32),
        ("fp16", torch.float16),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype(folder: Path, given: torch.dtype | str, expected: torch.dtype) -> None:
    dtypes = {parameter.dtype for parameter in load_model(folder, dtype=given).parameters()}
    assert dtypes == {expected}


def test_device(folder: Path) -> None:
    model = load_model(folder, device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    # The checkpoint's dtype where nothing is known against it.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_dtype_that_a_later_device_wants() -> None:
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("auto", "meta") == "auto"
    assert resolve_dtype("bf16", "cpu") == torch.bfloat16
    with pytest.raises(UserError, match="model.dtype"):
        resolve_dtype("bf17", "cpu")


def test_auto_is_bfloat16_where_a_processor_multiplies_tiles(
    folder: Path, processor: dict[str, bool]
) -> None:
    processor["amx_bf16"] = True
    assert resolve_dtype("auto", "cpu") == torch.bfloat16
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}
    processor.clear()  # another architecture has other names
    assert resolve_dtype("auto", "cpu") == torch.float32


@pytest.mark.parametrize("can", [True, False])
def test_auto_on_accelerators_is_what_is_known_of_them(
    can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known(including_emulation: bool) -> bool:
        return including_emulation or can

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", known)
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", known)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: can)
    expected = torch.bfloat16 if can else torch.float32  # float16 never
    for name in ("cuda:0", "xpu", "mps"):
        assert fast_dtype(torch.device(name)) == expected


def test_without_weights_constants_are_kept_aside(tmp_path: Path) -> None:
    tiny_model("gemma2").save_pretrained(tmp_path)
    real = load_model(tmp_path, device="cpu")
    empty = load_model(tmp_path, device="meta")
    assert {buffer.device.type for buffer in empty.buffers()} == {"meta"}
    assert "model.rotary_emb.inv_freq" in empty.graphtune_buffers
    assert_same_tensors(empty.graphtune_buffers, dict(real.named_buffers()))
    assert empty.state_dict().keys() == real.state_dict().keys()
    assert empty.lm_head.weight is empty.model.embed_tokens.weight


def test_without_weights_a_model_takes_no_memory(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    shape = {"num_hidden_layers": 4, "num_attention_heads": 8}
    LlamaConfig(hidden_size=64, intermediate_size=64, **shape).save_pretrained(small)
    LlamaConfig(hidden_size=2048, intermediate_size=4096, **shape).save_pretrained(large)
    process = psutil.Process()
    load_model(small, device="meta")  # what is allocated once
    before = process.memory_info().rss
    model = load_model(large, device="meta")
    assert sum(parameter.nbytes for parameter in model.parameters()) > 1e9
    assert process.memory_info().rss - before < 30e6


def test_attention_is_eager_where_the_class_has_no_other(tmp_path: Path) -> None:
    for family, expected in (("gemma2", "eager"), ("qwen3", "sdpa")):
        tiny_model(family).save_pretrained(tmp_path / family)
        for device in ("cpu", "meta"):
            model = load_model(tmp_path / family, device=device)
            assert model.config._attn_implementation == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_what_was_asked_for(folder: Path, device: str) -> None:
    for asked, expected in ((None, "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
        model = load_model(folder, device=device, attn_implementation=asked)
        assert model.config._attn_implementation == expected
    ours = load_model(folder, device=device, implementation="graphtune", attn_implementation="sdpa")
    assert isinstance(ours, Transformer)
    theirs = load_model(folder, device=device, implementation="auto", attn_implementation="eager")
    assert not isinstance(theirs, Transformer)


def test_eager_attention_reaches_the_graph(folder: Path) -> None:
    def operators(attention: str) -> set[str]:
        model = load_model(folder, dtype="fp32", device="meta", attn_implementation=attention)
        return {str(node.target) for node in gt.capture(model).graph.nodes}

    sdpa = "aten.scaled_dot_product_attention.default"
    assert sdpa in operators("sdpa") and "aten.softmax.int" not in operators("sdpa")
    assert sdpa not in operators("eager") and "aten.softmax.int" in operators("eager")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_that_cannot_be_is_refused(folder: Path, device: str, tmp_path: Path) -> None:
    def message(path: Path, **options: object) -> str:
        with pytest.raises(UserError, match="^model.attn_implementation: ") as info:
            load_model(path, device=device, **options)
        return str(info.value)

    tiny_model("gemma2").save_pretrained(tmp_path)
    flash = message(folder, attn_implementation="flash_attention_2")
    assert "'flash_attention_2'" in flash and "use 'sdpa' or 'eager'" in flash
    assert "use 'eager'" in message(tmp_path, attn_implementation="sdpa")
    ours = message(folder, implementation="graphtune", attn_implementation="eager")
    assert "'eager'" in ours and "'transformers'" in ours


def test_experts_are_grouped_matrix_products(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    for device in ("cpu", "meta"):
        model = load_model(tmp_path, device=device)
        assert model.config._experts_implementation == "grouped_mm"


def test_config_is_read_without_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert load_config(tmp_path).max_position_embeddings == 64
    with pytest.raises(UserError, match="model.id: cannot load"):
        load_model(tmp_path)


def test_a_tokenizer_without_padding_gets_one_that_is_in_the_vocabulary(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == 0
    assert len(tokenizer) == 27


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_config])
@pytest.mark.parametrize(
    "id", ["/no/such/folder", "./missing", "~/missing-model", "a/b/c", "missing.gguf", "", "runs/"]
)
def test_a_missing_path_is_refused_without_asking_the_hub(
    load: Callable[[str], object], id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where nobody has a folder of such a name
    monkeypatch.setattr("graphtune.models.sources.HfApi", None)  # calling it would fail
    with pytest.raises(UserError, match="^model.id: ") as info:
        load(id)
    assert repr(id) in str(info.value) and "\n" not in str(info.value)


def test_a_missing_path_names_its_neighbour(folder: Path) -> None:
    near = folder.with_name(folder.name.replace("llama", "lama"))
    with pytest.raises(UserError, match=f"did you mean '{folder}'"):
        load_model(near)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.id: .* holds no config.json"):
        load_model(tmp_path)


def test_a_file_that_is_not_gguf_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="model.id: .* not a .gguf one"):
        load_model(folder / "model.safetensors")


def test_a_hub_id_without_the_hub_is_refused_quickly() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="model.id: 'no-such-owner/no-such-model'"):
        load_model("no-such-owner/no-such-model")
    assert time.monotonic() - start < 10  # transformers alone: half a minute of retries


def test_weights_that_are_quantized_already_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for device in ("cpu", "meta"):
        with pytest.raises(UserError, match="model.id: .*quantized already"):
            load_model(tmp_path, device=device)


def test_an_unknown_dtype_or_device_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="model.dtype: 'bf17' is unknown; did you mean 'bf16'"):
        load_model(folder, dtype="bf17")
    with pytest.raises(UserError, match="model.device: 'gpu'"):
        load_model(folder, device="gpu")


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="model.id: cannot load"):
        load_model(tmp_path)
