"""Rules: the first that matches a name decides."""

import pytest

from graphtune.errors import UserError
from graphtune.rules import Named, match

PLACES = [
    Named(f"model.layers.{layer}.{part}", in_all_linear=True)
    for layer in range(12)
    for part in ("attn.q_proj", "attn.k_proj", "mlp.up_proj")
] + [Named("lm_head")]


def chosen(*targets, layers=None):
    return match(PLACES, targets, layers=layers, key="passes.some.targets")


def test_first_rule_that_matches_decides():
    found = chosen(
        {"sites": "*.layers.3.*", "rank": 1},
        {"sites": "q_proj", "rank": 2},
        {"sites": ["k_proj", "re:.*\\.4\\.mlp.*"], "skip": True},
        "all-linear",
    )
    assert found["model.layers.3.attn.q_proj"] == {"rank": 1}
    assert found["model.layers.2.attn.q_proj"] == {"rank": 2}
    assert found["model.layers.3.attn.k_proj"] == {"rank": 1}
    assert "model.layers.2.attn.k_proj" not in found
    assert "model.layers.4.mlp.up_proj" not in found
    assert found["model.layers.5.mlp.up_proj"] == {}
    assert "lm_head" not in found


def test_order_is_that_of_the_model():
    names = [place.name for place in PLACES]
    found = list(chosen("up_proj", "q_proj"))
    assert found == [name for name in names if "up_proj" in name or "q_proj" in name]


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [([3], {3}), (["8..11"], {8, 9, 10, 11}), ([0, "2..3"], {0, 2, 3}), ("1..2", {1, 2})],
)
def test_layers(layers, numbers):
    found = chosen("q_proj", layers=layers)
    assert {int(name.split(".")[2]) for name in found} == numbers
    assert chosen({"sites": "q_proj", "layers": layers}) == found


def test_a_last_name_is_whole():
    assert len(chosen("q_proj")) == 12
    with pytest.raises(UserError):
        chosen("proj")


@pytest.mark.parametrize(
    ("targets", "layers", "message"),
    [
        (["q_porj"], None, r"`passes.some.targets`: 'q_porj' matches no site.*nearest: q_proj"),
        (["lm_head"], [2], "'lm_head' matches no site"),
        (["q_proj"], [12], r"passes.some.layers=\[12\]`: the model has layers 0..11"),
        (["q_proj"], ["a"], r"passes.some.layers=\[a\]` must be numbers and ranges"),
        ([{"sites": []}], None, r"targets\[0\].sites"),
        ([{"sites": "q_proj", "layers": [-1]}], None, r"targets\[0\].layers"),
        (["re:["], None, "no regular expression"),
    ],
)
def test_malformed_rules_are_refused(targets, layers, message):
    with pytest.raises(UserError, match=message):
        chosen(*targets, layers=layers)
