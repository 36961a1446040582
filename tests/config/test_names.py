"""Short names of components, and which code is others'."""

import pytest
import torch

import graphtune.data
from graphtune.config import foreign_code, load_config, validate
from graphtune.config.instantiate import Component, component
from graphtune.config.names import with_dotted_path
from graphtune.errors import UserError


@pytest.mark.parametrize(
    ("key", "name", "expected"),
    [
        ("dataset", "alpaca", graphtune.data.alpaca),
        ("dataset[1]", "alpaca", graphtune.data.alpaca),
        ("dataset_val", "hh_rlhf_helpful", graphtune.data.hh_rlhf_helpful),
        ("retention", "pydoc_topics", graphtune.data.pydoc_topics),
        ("optimizer", "adamw", torch.optim.AdamW),
        ("optimizer", "AdamW", torch.optim.AdamW),
        ("optimizer", "sgd", torch.optim.SGD),
        ("lr_scheduler", "cosine_annealing_lr", torch.optim.lr_scheduler.CosineAnnealingLR),
    ],
)
def test_a_name_is_found_where_its_key_looks(key: str, name: str, expected: object) -> None:
    found = with_dotted_path(Component(name, {"lr": 1}, key))
    assert component(found.path) is expected
    assert (found.arguments, found.key) == ({"lr": 1}, key)


def test_muon_is_the_one_that_takes_every_parameter() -> None:
    found = with_dotted_path(Component("muon", {}, "optimizer"))
    assert found.path == "graphtune.training.optimizers.MuonWithAdamW"


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("dataset", "alpacca", r"`dataset._component_=alpacca`.*graphtune.data; did you mean"),
        ("optimizer", "adamm", "did you mean `adam`"),
        ("dataset", "adamw", "no such name in graphtune.data"),  # each key has its own names
        ("dataset", "Loader", "no such name"),  # what is there, but reads no data
    ],
)
def test_an_unknown_name_gets_the_closest(key: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_dotted_path(Component(name, {}, key))


def test_dotted_paths_stay_as_they_are() -> None:
    given = Component("my.data.alpaca", {}, "dataset")
    assert with_dotted_path(given) is given


def test_a_config_may_use_names() -> None:
    overrides = ["dataset=text", "dataset.source=x.txt", "optimizer=sgd", "~dataset_val"]
    config = validate(load_config("quickstart", overrides))
    assert isinstance(config.dataset, Component)
    assert config.dataset.path == "graphtune.data.text"
    assert config.optimizer.path == "torch.optim.SGD"
    with pytest.raises(UserError, match=r"`optimizer.beta`"):  # the signature is checked too
        validate(load_config("quickstart", ["optimizer=sgd", "optimizer.beta=1"]))


def test_foreign_code_is_found_wherever_it_is() -> None:
    config = {
        "dataset": [{"_component_": "alpaca"}, {"_component_": "mine.data", "to": ["x"]}],
        "optimizer": {"_component_": "torch.optim.AdamW", "hook": {"_component_": "its.hook"}},
        "passes": {"lora": {}, "my.pass.Thing": None, "graphtune.passes.LoRA": {}},
    }
    assert foreign_code(config) == [
        ("dataset[1]", "mine.data"),
        ("optimizer.hook", "its.hook"),
        ("passes", "my.pass.Thing"),
    ]
    assert foreign_code({"optimizer": {"_component_": "torchery.Adam"}}) == [
        ("optimizer", "torchery.Adam")
    ]
