"""Published sizes, what configs mean, and loading into our decoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

import graphtune as gt
from graphtune.config import load_config as load_yaml
from graphtune.config import models
from graphtune.errors import UserError
from graphtune.models import families, load_config, load_model
from graphtune.models.families import FAMILIES, Family, build_model, published_config, read_options
from graphtune.models.transformer import Transformer
from graphtune.weights import load_weights
from tests.oracles.models import assert_same_tensors, random_ids, tiny_gpt2, tiny_model

# --- sizes ------------------------------------------------------------------------------------

SIZES = {name: family for family in FAMILIES for name in family.sizes}
# Models of the same shapes need no second look.
DIFFERENT = list({id(f.sizes[name]): name for name, f in reversed(SIZES.items())}.values())


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_published_size_has_its_parameters(name: str) -> None:
    family: Family = SIZES[name]
    with torch.device("meta"):
        ours = build_model(family.config(name))
        theirs = AutoModelForCausalLM.from_config(family.config(name))
    assert (
        sum(parameter.numel() for parameter in ours.parameters()) == family.sizes[name].parameters
    )
    assert shapes(ours) == shapes(theirs)


def test_a_published_size_is_listed_once() -> None:
    assert len(SIZES) == sum(len(family.sizes) for family in FAMILIES)


def test_a_family_file_stays_small() -> None:
    for module in Path(families.__file__).parent.glob("*.py"):
        if "FAMILY = " in module.read_text():
            assert len(module.read_text().splitlines()) < 80, module.name


# --- configs ----------------------------------------------------------------------------------


def test_a_model_keeps_its_own_config() -> None:
    config = tiny_model("gemma2").config
    model = build_model(config)
    assert model.config.to_dict() == config.to_dict()
    assert config._attn_implementation == "eager"
    assert model.config._attn_implementation is None


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_layers_that_are_alike_share_their_rotation(name: str) -> None:
    options = read_options(tiny_model(name).config)
    ropes = {layer.attention.rope for layer in options.layers}
    assert len(build_model(tiny_model(name).config).model.rotary_emb) == len(ropes)
    assert len(ropes) == (2 if name == "gemma3" else 1)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (lambda: LlamaConfig(hidden_act="relu"), "hidden_act='relu'"),
        (lambda: GemmaConfig(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        (lambda: Qwen2Config(layer_types=["chunked_attention"] * 32), "chunked_attention"),
        (
            lambda: MistralConfig(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}),
            "rope_type='proportional'",
        ),
    ],
)
def test_what_the_decoder_has_not_is_refused(config: Any, key: str) -> None:
    with pytest.raises(UserError, match=key) as raised:
        build_model(config())
    assert "use implementation 'transformers'" in str(raised.value)


# --- loading ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    models = {name: tiny_model(name) for name in ("llama", "gemma2", "qwen3_moe")}
    for name, model in (models | {"gpt2": tiny_gpt2()}).items():
        model.save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_a_checkpoint_loads_into_ours(folders: dict[str, Path], name: str) -> None:
    theirs = load_model(folders[name])
    ours = load_model(folders[name], implementation="graphtune")
    assert isinstance(ours, Transformer)
    assert ours.training
    assert ours.graphtune_source == str(folders[name])
    assert ours.config.use_cache is False
    assert_same_tensors(ours.state_dict(), theirs.state_dict())
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied == theirs.config.tie_word_embeddings
    ids = random_ids(2, 9)
    torch.testing.assert_close(ours(ids), theirs(input_ids=ids, use_cache=False).logits)


def test_a_checkpoint_loads_in_a_dtype(folders: dict[str, Path]) -> None:
    model = load_model(folders["gemma2"], implementation="graphtune", dtype="bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_on_the_meta_device_constants_are_kept_aside(folders: dict[str, Path], name: str) -> None:
    real = load_model(folders[name], implementation="graphtune", device="cpu")
    empty = load_model(folders[name], implementation="graphtune", device="meta")
    assert isinstance(empty, Transformer)
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"meta"}
    assert_same_tensors(empty.graphtune_buffers, dict(real.named_buffers()))
    assert "model.rotary_emb.0.inv_freq" in empty.graphtune_buffers
    assert shapes(empty) == shapes(real)
    if empty.options.tied:
        assert empty.lm_head.weight is empty.model.embed_tokens.weight


def test_weights_stream_into_a_captured_model(folders: dict[str, Path]) -> None:
    for name in ("gemma2", "qwen3_moe"):
        real = load_model(folders[name], implementation="graphtune")
        empty = load_model(folders[name], implementation="graphtune", device="meta", dtype="fp32")
        program = load_weights(gt.capture(empty), device="cpu")
        ids = random_ids(2, 9)
        torch.testing.assert_close(program(ids), real(ids))


def test_auto_takes_ours_where_it_can(folders: dict[str, Path], tmp_path: Path) -> None:
    assert isinstance(load_model(folders["llama"], implementation="auto"), Transformer)
    assert not isinstance(load_model(folders["gpt2"], implementation="auto"), Transformer)
    assert not isinstance(load_model(folders["llama"]), Transformer)
    config: PretrainedConfig = load_config(folders["llama"])
    config.hidden_act = "relu"
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert not isinstance(load_model(tmp_path, implementation="auto"), Transformer)


def test_an_unknown_family_is_named(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="'gpt2', only for gemma, .*starcoder2"):
        load_model(folders["gpt2"], implementation="graphtune")


def test_an_unknown_implementation_is_named(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="'transformer' is unknown; did you mean 'transformers'"):
        load_model(folders["llama"], implementation="transformer")  # type: ignore[arg-type]


# --- shapes known by name ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "base"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-3.1-70B"),
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("google/gemma-2-2b-it", "google/gemma-2-2b"),
        ("google/gemma-3-1b-it", "google/gemma-3-1b-pt"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"),
    ],
)
def test_a_published_config_is_known_without_a_hub(id: str, base: str) -> None:
    config = published_config(id)
    assert config is not None
    assert config.to_dict() == SIZES[base].config(base).to_dict()


@pytest.mark.parametrize("id", ["somebody/Llama-3.1-70B", "meta-llama/Llama-3.1-71B", "pypi:x==1"])
def test_others_are_not(id: str) -> None:
    assert published_config(id) is None


def test_every_model_of_the_catalogue_has_a_published_config() -> None:
    for name in models():
        assert published_config(load_yaml(name).model.id) is not None, name
