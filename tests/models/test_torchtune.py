"""torchtune's layout: written here by the inverse of what is tested, row by row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig

import graphtune as gt
from graphtune.errors import UserError
from graphtune.models import load_model
from graphtune.weights import load_weights
from tests.oracles.models import assert_same_tensors, random_ids, tiny_model

HEAD_DIM = 8  # of all tiny models
NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "output.weight",
    "self_attn.o_proj.": "attn.output_proj.",
    "self_attn.q_norm.weight": "attn.q_norm.scale",
    "self_attn.k_norm.weight": "attn.k_norm.scale",
    "self_attn.": "attn.",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "input_layernorm.weight": "sa_norm.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
    "model.layers": "layers",
}
GEMMA2 = {
    "model.norm.weight": "norm.rms_norm.scale",
    "post_attention_layernorm.weight": "sa_scale.scale",
    "pre_feedforward_layernorm.weight": "mlp_norm.scale",
    "post_feedforward_layernorm.weight": "mlp_scale.scale",
}
INTERLEAVED = ("llama", "mistral", "gemma", "gemma2")
FAMILIES = [*INTERLEAVED, "qwen2", "qwen3", "phi3"]


def model_of(family: str) -> nn.Module:
    if family != "gemma":
        return _with_random_norms(tiny_model(family))
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
    )
    return _with_random_norms(AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def _with_random_norms(model: nn.Module) -> nn.Module:
    """Norms and biases are made all alike, so that two swapped ones would not show."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def to_torchtune(model: nn.Module, family: str) -> dict[str, Tensor]:
    names = NAMES | GEMMA2 if family == "gemma2" else NAMES
    written = {}
    for name, tensor in _split(model.state_dict()).items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if family in INTERLEAVED and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = tensor[_interleaved(len(tensor))]
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        written[name] = tensor.clone()
    return written


def _split(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Phi 3's fused projections apart: 4 query heads and 2 of keys and values."""
    parts = {}
    for name, tensor in state.items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", tensor.split([32, 16, 16]), strict=True):
                parts[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif "gate_up_proj" in name:
            parts[name.replace("gate_up", "gate")] = tensor[:48]
            parts[name.replace("gate_up", "up")] = tensor[48:]
        else:
            parts[name] = tensor
    return parts


def _interleaved(rows: int) -> list[int]:
    half = HEAD_DIM // 2
    order = []
    for head in range(0, rows, HEAD_DIM):
        for pair in range(half):
            order += [head + pair, head + pair + half]
    return order


def write(folder: Path, family: str, file: str = "model-00001-of-00001.bin") -> nn.Module:
    model = model_of(family)
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    torch.save(to_torchtune(model, family), folder / file)
    return model.train()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write(tmp_path / "llama", "llama")
    return tmp_path / "llama"


@pytest.mark.filterwarnings("ignore:.*swapped two norms of Gemma 2")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_that_was_written(family: str, tmp_path: Path) -> None:
    model = write(tmp_path / family, family)
    ids = random_ids(2, 13)
    found = load_model(tmp_path / family, dtype="fp32")
    assert torch.equal(found(ids).logits, model(ids).logits)
    assert found.state_dict().keys() == model.state_dict().keys()


def test_the_inverse_does_something() -> None:
    model = model_of("llama")
    name = "layers.0.attn.q_proj.weight"
    turned = to_torchtune(model, "llama")[name]
    assert not torch.equal(turned, model.state_dict()[f"model.{name.replace('attn', 'self_attn')}"])


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_weights_are_streamed(family: str, tmp_path: Path) -> None:
    model = write(tmp_path / family, family)
    program = load_weights(gt.capture(load_model(tmp_path / family, dtype="fp32", device="meta")))
    assert_same_tensors(dict(program.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("file", ["torchtune_model_2.pt", "model_0.pt"])
def test_names_that_files_had_before(file: str, tmp_path: Path) -> None:
    model = write(tmp_path / "llama", "llama", file)
    (tmp_path / "llama" / "adapter_0.pt").write_bytes(b"")
    (tmp_path / "llama" / "recipe_state.pt").write_bytes(b"")
    ids = random_ids(1, 5)
    found = load_model(tmp_path / "llama", dtype="fp32")
    assert torch.equal(found(ids).logits, model(ids).logits)


def test_hugging_faces_names_in_files_that_it_does_not_find(tmp_path: Path) -> None:
    """What recipes wrote up to torchtune 0.4."""
    model = model_of("qwen2").train()
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    names = sorted(state)
    for index, part in enumerate((names[:9], names[9:])):
        torch.save({n: state[n] for n in part}, tmp_path / f"hf_model_000{index + 1}_0.pt")
    ids = random_ids(1, 5)
    assert torch.equal(load_model(tmp_path, dtype="fp32")(ids).logits, model(ids).logits)
    (tmp_path / "hf_model_0001_0.pt").unlink()
    with pytest.raises(UserError, match="model.id: .* lacks part 1 of 2"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_recipes_write_since(kind: str, tmp_path: Path) -> None:
    """Hugging Face's layout, whose files have names of torchtune's."""
    model = model_of("qwen2").train()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    renamed = {}
    for old in sorted(set(found["weight_map"].values())):
        new = f"ft-{old}" if kind == "safetensors" else old.replace("safetensors", "bin")
        renamed[old] = new
        if kind == "safetensors":
            (tmp_path / old).rename(tmp_path / new)
        else:
            (tmp_path / old).unlink()
            part = [name for name, file in found["weight_map"].items() if file == old]
            torch.save({name: model.state_dict()[name] for name in part}, tmp_path / new)
    found["weight_map"] = {name: renamed[file] for name, file in found["weight_map"].items()}
    index.unlink()
    name = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    (tmp_path / f"{name}.index.json").write_text(json.dumps(found))
    ids = random_ids(1, 5)
    loaded = load_model(tmp_path, dtype="fp32")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    empty = gt.capture(load_model(tmp_path, dtype="fp32", device="meta"))
    assert_same_tensors(dict(load_weights(empty).state_dict()), dict(model.state_dict()))


def _edit(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (file,) = folder.glob("*.bin")
        tensors = torch.load(file, weights_only=True)
        edit(tensors)
        torch.save(tensors, file)

    return change


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


Q = "layers.0.attn.q_proj.weight"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "copy the base model's config.json"),
    "another family": (_config(model_type="gpt2"), "model type 'gpt2'.* of gemma, gemma2, llama"),
    "an adapter": (_edit(lambda t: t.update({"layers.0.attn.q_proj.lora_a.weight": t[Q]})), "merg"),
    "unknown": (_edit(lambda t: t.update({"layers.0.attn.bonus.weight": t[Q]})), "a llama has not"),
    "missing": (_edit(lambda t: t.pop("norm.scale")), "lacks 'model.norm.weight'"),
    "other heads": (_config(num_key_value_heads=1), "k_proj.weight has 16 rows"),
    "other width": (_config(intermediate_size=40), "has shape"),
    "no tensors": (_edit(lambda t: t.update(model={})), "'model', which is a dict"),
    "damaged": (lambda f: next(f.glob("*.bin")).write_bytes(b"PK\x03\x04" * 9), "cannot be read"),
    "half of it": (
        lambda f: next(f.glob("*.bin")).rename(f / "model-00001-of-00002.bin"),
        "lacks part 2 of 2",
    ),
    "two epochs": (lambda f: torch.save({}, f / "model_1.pt"), "several of torchtune's"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_wrong_is_said_in_one_line(case: str, streamed: bool, checkpoint: Path) -> None:
    spoil, message = BAD[case]
    spoil(checkpoint)
    with pytest.raises(UserError, match=f"^model.id: .*{message}") as info:
        if streamed:
            load_weights(gt.capture(load_model(checkpoint, device="meta")))
        else:
            load_model(checkpoint)
    assert "\n" not in str(info.value)


def test_gemma_2_warns_of_what_old_versions_did(tmp_path: Path) -> None:
    write(tmp_path, "gemma2")
    with pytest.warns(UserWarning, match="swapped two norms of Gemma 2"):
        load_model(tmp_path)
