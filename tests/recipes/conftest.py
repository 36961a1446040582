"""A tiny model in a folder, with a tokenizer, and a config that trains it."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from graphtune.capture import capture
from tests.data.conftest import backend, tokenizer  # noqa: F401  (fixtures)

QUESTIONS = [f"What is {a} and {b}?" for a in range(6) for b in range(4)]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):  # noqa: F811
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path, model_folder):
    """Mapping of a config; `write` it and train."""
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": q, "response": "Both."}) + "\n" for q in QUESTIONS)
    )
    return {
        "recipe": "sft",
        "output_dir": str(tmp_path / "run"),
        "model": {"id": str(model_folder)},
        "passes": {"lora": {"rank": 4, "alpha": 8}},
        "dataset": {"_component_": "graphtune.data.instruct", "source": str(data)},
        "dataset_val": {"_component_": "graphtune.data.instruct", "source": str(data)},
        "retention": {"_component_": "graphtune.data.pydoc_topics", "limit": 2},
        "loader": {"batch_size": 2, "length": 64, "mode": "packed"},
        "optimizer": {"lr": 1e-2},
        "lr_scheduler": {"warmup_steps": 1},
        "max_steps": 8,
        "compile": False,
    }


@pytest.fixture
def quick(config, model_folder, monkeypatch):
    """The config without what takes longest: the graph is captured once, its memory never asked
    for, and nothing measured before and after."""

    def captured(model, **_):
        if model_folder not in _CAPTURED:
            _CAPTURED[model_folder] = capture(model)
        return _CAPTURED[model_folder]

    monkeypatch.setattr("graphtune.recipes.sft.capture", captured)
    monkeypatch.setattr("graphtune.recipes.job.check_fits", lambda *_, **__: None)
    del config["dataset_val"], config["retention"]
    return config


_CAPTURED = {}  # a program without weights, by its model's folder; nothing changes it


@pytest.fixture
def write(tmp_path):
    def write(config):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write
