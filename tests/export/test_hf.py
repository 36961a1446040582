"""What `to_hf` writes is what transformers loads, bit for bit, and it is whole or not there."""

import copy
import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

import graphtune as gt
from graphtune.errors import UserError
from graphtune.export import to_hf
from graphtune.passes import LoRA, Merge
from tests.oracles.models import (
    FAMILIES,
    assert_same_tensors,
    random_ids,
    tiny_gpt2,
    tiny_model,
)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=random_ids(2, 9), use_cache=False).logits


def tokenizer():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="</s>",
        chat_template="{{ messages }}",
    )


def perturb_adapters(program):
    """As training would: an adapter starts as the identity."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in program.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return program


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "gpt2"])
def test_transformers_loads_the_same_weights_and_logits(family, tmp_path):
    model = tiny_gpt2() if family == "gpt2" else tiny_model(family)
    folder = to_hf(gt.capture(model), tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits(loaded), logits(model))


def test_a_transformers_model_is_saved_like_a_program_of_it(tmp_path):
    model = tiny_model("llama")
    of_model = to_hf(model, tmp_path / "model")
    of_program = to_hf(gt.capture(model), tmp_path / "program")
    for name in ("config.json", "generation_config.json"):
        assert (of_model / name).read_text() == (of_program / name).read_text()
    # Not byte for byte: safetensors writes a header's metadata in any order.
    weights = [load_file(folder / "model.safetensors") for folder in (of_model, of_program)]
    assert_same_tensors(*weights)


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    model = tiny_model("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    folder = to_hf(gt.capture(model), tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    # vLLM and llama.cpp read the embedding, and skip a head that the config calls tied.
    assert names == model.state_dict().keys() - {"lm_head.weight"}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_merged_output_head_is_not_tied_any_more(tmp_path):
    model = tiny_model("llama")
    adapted = perturb_adapters(gt.capture(model).apply(LoRA(rank=2, targets=("lm_head",))))
    merged = adapted.apply(Merge())
    loaded = AutoModelForCausalLM.from_pretrained(to_hf(merged, tmp_path / "out"))
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(logits(loaded), merged.eval()(random_ids(2, 9)))


def test_weights_tied_by_hand_are_loaded_tied(tmp_path):
    model = tiny_model("mistral")  # whose config says untied
    model.lm_head.weight = model.model.embed_tokens.weight
    loaded = AutoModelForCausalLM.from_pretrained(to_hf(model, tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(model))


def test_shards_have_an_index_and_load(tmp_path):
    model = tiny_model("qwen3")
    folder = to_hf(model, tmp_path / "out", max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # tied and untied
def test_tensors_are_fetched_one_file_at_a_time(family, tmp_path):
    model, limit = tiny_model(family), 20_000
    empty = copy.deepcopy(model).to("meta")
    empty.tie_weights()
    fetched, most = weakref.WeakValueDictionary(), 0

    def fetch(name):
        nonlocal most
        tensor = fetched[name] = model.state_dict()[name].clone()
        most = max(most, sum(one.nbytes for one in fetched.values()))
        return tensor

    options = {"max_shard_size": limit, "verify": False}
    folder = to_hf(empty, tmp_path / "fetched", fetch=fetch, **options)
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert most <= max(limit, largest) < sum(p.nbytes for p in model.parameters()) / 2
    expected = to_hf(model, tmp_path / "at_once", **options)
    files = {path.name for path in expected.iterdir()} - {"manifest.json"}
    for name in files:
        assert (folder / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_config_says_the_dtype_that_was_saved(dtype, tmp_path):
    model = tiny_model("llama").to(dtype)
    model.config.dtype = torch.float16  # of the file that it was loaded from
    folder = to_hf(model, tmp_path / "out")
    assert AutoConfig.from_pretrained(folder).dtype == dtype
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype
    assert model.config.dtype == torch.float16  # the caller's config is not touched


def test_the_config_forgets_how_the_source_was_stored_and_trained(tmp_path):
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    model.config.use_cache = False
    folder = to_hf(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["use_cache"] is True
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not model.config.use_cache


def test_generation_stops_at_the_same_tokens(tmp_path):
    model = tiny_model("llama")
    model.config.eos_token_id = [5, 7]
    folder = to_hf(gt.capture(model), tmp_path / "out")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [5, 7]


def test_the_tokenizer_lies_beside(tmp_path):
    folder = to_hf(tiny_model("llama"), tmp_path / "out", tokenizer=tokenizer())
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded("hello hello").input_ids == [2, 2]
    assert loaded.eos_token_id == 1
    assert loaded.chat_template == "{{ messages }}"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert (to_hf(tiny_model("llama"), tmp_path / "out") / "config.json").is_file()


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out_dir=.* is not empty"):
        to_hf(tiny_model("llama"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="is a file"):
        to_hf(tiny_model("llama"), tmp_path / "notes.txt")


def test_adapters_must_be_merged_first(tmp_path):
    program = gt.capture(tiny_model("llama")).apply(LoRA(rank=2))
    with pytest.raises(UserError, match=r"not merged.*Merge\(\)"):
        to_hf(program, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_module_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="no transformers config"):
        to_hf(nn.Linear(2, 2), tmp_path / "out")


def test_nothing_is_left_if_writing_fails(tmp_path):
    class Failing(PreTrainedTokenizerFast):
        def save_pretrained(self, *args, **kwargs):
            raise OSError("no space left on device")

    failing = Failing(tokenizer_object=copy.deepcopy(tokenizer().backend_tokenizer))
    with pytest.raises(OSError, match="no space"):
        to_hf(tiny_model("llama"), tmp_path / "out", tokenizer=failing)
    assert list(tmp_path.iterdir()) == []


def test_our_own_decoder_is_written_as_transformers_class(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "theirs")
    ours = gt.load_model(tmp_path / "theirs", implementation="graphtune")
    to_hf(gt.capture(ours), tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = random_ids(2, 9)
    torch.testing.assert_close(again(ids).logits, ours(ids), atol=1e-4, rtol=1e-4)
    assert type(again).__name__ == "LlamaForCausalLM"
