"""stream_weights yields what from_pretrained loads, one tensor at a time."""

import json
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from graphtune.errors import UserError
from graphtune.models import load_config, load_model
from graphtune.models.streaming import stream_weights
from tests.oracles.models import FAMILIES, assert_same_tensors, tiny_gpt2, tiny_model

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def stream(folder: Path, **options: object) -> dict[str, Tensor]:
    pairs = list(stream_weights(folder, load_config(folder), **options))
    found = dict(pairs)
    assert len(found) == len(pairs), "a name came twice"
    return found


def assert_as_from_pretrained(
    folder: Path, dtype: torch.dtype | str = "auto", **options: object
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    found = stream(folder, dtype=dtype, **options)
    tied = expected.keys() - found.keys()
    there = {expected[name].data_ptr() for name in found.keys() & expected.keys()}
    assert all(expected[name].data_ptr() in there for name in tied)
    assert_same_tensors(found, {n: t for n, t in expected.items() if n not in tied})
    assert all(found[name].dtype == expected[name].dtype for name in found)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "gpt2"])
def test_names_and_values_are_those_of_from_pretrained(family: str, tmp_path: Path) -> None:
    model = tiny_gpt2() if family == "gpt2" else tiny_model(family)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for folder in (tmp_path / "one", tmp_path / "many"):
        assert_as_from_pretrained(folder)
    assert_as_from_pretrained(tmp_path / "many", dtype=torch.bfloat16)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_weight_comes_once(tied: bool, tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert_as_from_pretrained(tmp_path)
    assert ("lm_head.weight" in stream(tmp_path)) == (not tied)


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SMALL, num_local_experts=12, num_experts_per_tok=2),
        Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=12, moe_intermediate_size=8),
    ],
    ids=["mixtral", "qwen3_moe"],
)
def test_experts_are_stacked_in_order_from_wherever_they_lie(config, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    assert sum(".experts.11." in name for name in whole) == 6  # they lie apart in the file
    (tmp_path / "model.safetensors").unlink()
    files = [f"model-{i}.safetensors" for i in range(3)]
    index = {name: files[i % 3] for i, name in enumerate(sorted(whole, reverse=True))}
    for file in files:
        part = {name: tensor for name, tensor in whole.items() if index[name] == file}
        save_file(part, tmp_path / file, {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    assert_as_from_pretrained(tmp_path)
    assert_as_from_pretrained(tmp_path, dtype=torch.bfloat16)


def test_a_prefix_that_the_checkpoint_lacks_is_added(tmp_path: Path) -> None:
    tiny_gpt2().transformer.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert_as_from_pretrained(tmp_path)


def test_a_prefix_that_the_checkpoint_has_besides_is_removed(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    rewrite(
        tmp_path, lambda all: {n.replace("lm_head", "model.lm_head"): t for n, t in all.items()}
    )
    assert_as_from_pretrained(tmp_path)


def test_what_the_model_lacks_comes_under_the_checkpoints_name(tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.save_pretrained(tmp_path)
    ignored = {"transformer.h.0.attn.bias": torch.ones(1), "h.1.attn.bias": torch.ones(1)}
    spare = {"spare.weight": torch.arange(3.0)}
    rewrite(tmp_path, lambda all: all | ignored | spare)
    found = stream(tmp_path)
    assert_same_tensors({"spare.weight": found.pop("spare.weight")}, spare)
    assert found.keys() == model.state_dict().keys() - {"lm_head.weight"}


def test_parameters_that_stay_in_float32_do(tmp_path: Path) -> None:
    config = Ernie4_5_MoeConfig(**SMALL, moe_num_experts=4, moe_k=2, moe_intermediate_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert_as_from_pretrained(tmp_path, dtype=torch.bfloat16)
    real = load_model(tmp_path, dtype="bf16", device="cpu").state_dict()
    empty = load_model(tmp_path, dtype="bf16", device="meta").state_dict()
    assert {n: t.dtype for n, t in empty.items()} == {n: t.dtype for n, t in real.items()}
    assert {t.dtype for t in empty.values()} == {torch.bfloat16, torch.float32}


def test_the_dtype_is_the_configs_unless_given(tmp_path: Path) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    config = load_model(tmp_path, dtype="fp32", device="meta").config

    def dtypes(pairs: Iterable[tuple[str, Tensor]]) -> set[torch.dtype]:
        return {tensor.dtype for _, tensor in pairs}

    assert dtypes(stream_weights(tmp_path, load_config(tmp_path))) == {torch.bfloat16}
    assert dtypes(stream_weights(tmp_path, config)) == {torch.float32}
    assert dtypes(stream_weights(tmp_path, config, dtype="fp16")) == {torch.float16}
    assert config.dtype == torch.float32  # the caller's own


def test_torch_checkpoints_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    _without_weights(tmp_path, model)
    names = sorted(state)
    files = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in names if files[name] == file}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    monkeypatch.setattr("graphtune.models.streaming._load_whole", None)
    found = stream(tmp_path, dtype=torch.float32)
    assert_same_tensors(found, state)
    for tensor in found.values():
        tensor.zero_()
    assert_same_tensors(stream(tmp_path, dtype=torch.float32), state)


def test_torch_checkpoints_of_the_old_format_are_loaded_whole(tmp_path: Path) -> None:
    model = tiny_model("llama")
    _without_weights(tmp_path, model)
    file = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    assert_same_tensors(stream(tmp_path), dict(model.state_dict()))


def test_only_the_checkpoints_own_files_are_fetched(tmp_path: Path, monkeypatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    asked: list[list[str]] = []

    def snapshot(
        id: str, *, revision: str, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        assert (id, revision, local_files_only) == ("owner/name", "v1", False)
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("graphtune.models.streaming.snapshot_download", snapshot)
    monkeypatch.setattr("graphtune.models.sources._hub_has", lambda id, revision: True)
    found = dict(stream_weights("owner/name", load_config(tmp_path), revision="v1"))
    assert_same_tensors(found, stream(tmp_path))
    assert asked == [["model.safetensors", "model.safetensors.index.json"], shards]


def test_nothing_is_kept_of_what_was_yielded(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    for _name, tensor in stream_weights(tmp_path, load_config(tmp_path)):
        gone = weakref.ref(tensor)
        del tensor
        assert gone() is None


def test_memory_holds_about_one_tensor(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL | {"hidden_size": 1024, "intermediate_size": 2048})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    process = psutil.Process()
    dict(stream_weights(tmp_path, config)).clear()  # what is allocated once
    before = process.memory_info().rss
    highest = 0
    for _name, tensor in stream_weights(tmp_path, config):
        tensor.sum()  # a file that is mapped takes memory as far as it was looked at
        del tensor
        highest = max(highest, process.memory_info().rss - before)
    assert size > 70e6
    assert highest < 0.4 * size


def _without_weights(folder: Path, model: nn.Module | None = None) -> None:
    (model or tiny_model("llama")).save_pretrained(folder)
    (folder / "model.safetensors").unlink()


def test_missing_weights_are_refused_when_called(tmp_path: Path) -> None:
    _without_weights(tmp_path)
    with pytest.raises(UserError, match="model.id: cannot load"):
        stream_weights(tmp_path, load_config(tmp_path))
    with pytest.raises(UserError, match="model.id: .* does not exist"):
        stream_weights(tmp_path / "nowhere", load_config(tmp_path))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    _without_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="model.id: cannot load"):
        stream_weights(tmp_path, load_config(tmp_path))


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="model.id: cannot load"):
        stream_weights(tmp_path, load_config(tmp_path))


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="model.id: cannot load"):
        list(stream_weights(tmp_path, load_config(tmp_path)))


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = load_config(tmp_path)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UserError, match="quantized already"):
        stream_weights(tmp_path, config)


def test_the_reader_that_keeps_no_mapping_exists(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file({"x": torch.ones(2)}, file)
    with safe_open(file, framework="pt", backend="pread") as opened:
        assert torch.equal(opened.get_tensor("x"), torch.ones(2))
