"""TensorParallel beside the same training in one process, on gloo; shapes in a world that is not
there."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import GPT2Config, LlamaConfig, Qwen2Config

import graphtune as gt
from graphtune.distributed import make_mesh
from graphtune.errors import UserError
from graphtune.models.empty import empty_model
from graphtune.passes import LoRA, Quantize, TensorParallel
from tests.oracles.models import tiny_gpt2, tiny_model
from tests.oracles.ranks import World
from tests.oracles.tensor_cases import Case, compare_all, compiled, fused

TWO = {"tp": 2, "dp_shard": 1}
SEQUENCE = {"sequence_parallel": True}
CASES = {
    "llama": Case("llama", mesh=TWO),
    "qwen2, sharded logits": Case("qwen2", tensor={"gather_logits": False}, mesh=TWO),
    "qwen3, sequence": Case("qwen3", tensor=SEQUENCE, mesh=TWO),
    "phi3, fused": Case("phi3", mesh=TWO),
    "wide, qlora": Case("wide", "qlora", mesh=TWO),
}
MORE = {
    "gemma2, sequence": Case("gemma2", tensor=SEQUENCE, mesh=TWO),
    "gpt2": Case("gpt2", mesh=TWO),
    "qwen2, dora": Case("qwen2", "dora", mesh=TWO),
    "gemma2, whole vocabulary": Case("gemma2", tensor={"vocab_parallel": False}, mesh=TWO),
    "phi3, fused, lora, sequence": Case("phi3", "lora", SEQUENCE, TWO),
    "gpt2, lora, sequence": Case("gpt2", "lora", SEQUENCE, TWO),
    "qwen2, lora": Case("qwen2", "lora", mesh=TWO),
    "wide, qlora, sequence": Case("wide", "qlora", SEQUENCE, TWO),
    "wide, int8": Case("wide", "int8", mesh=TWO),
}
FOUR = {
    "wide, four ranks": Case("wide", mesh={"tp": 4, "dp_shard": 1}),
    "wide, int8, four ranks": Case("wide", "int8", mesh={"tp": 4, "dp_shard": 1}),
    "llama, with fsdp": Case("llama", mesh={"tp": 2, "dp_shard": 2}),
    "qwen2, lora, sequence, with fsdp": Case("qwen2", "lora", SEQUENCE, {"tp": 2, "dp_shard": 2}),
}


def _run(cases: dict[str, Case], world: World) -> dict[str, list[Any]]:
    results = world(compare_all, list(cases.values()))
    return {name: [one[i] for one in results] for i, name in enumerate(cases)}


@pytest.fixture(scope="module")
def ranks() -> Iterator[World]:
    started = World(2)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def two(ranks: World) -> dict[str, list[Any]]:
    return _run(CASES, ranks)


@pytest.fixture(scope="module")
def more(ranks: World) -> dict[str, list[Any]]:
    return _run(MORE, ranks)


@pytest.fixture(scope="module")
def four() -> Iterator[dict[str, list[Any]]]:
    world = World(4)
    yield _run(FOUR, world)
    world.stop()


def _check(results: list[Any]) -> None:
    for rank, found in enumerate(results):
        assert isinstance(found, dict), f"rank {rank}: {found}"
        assert found["greedy"] == 0
        assert found["logits"] < 1e-5, found
        # Adam's first steps are as long for a small gradient, and its rounding, as for a large one.
        for key, limit in (("losses", 1e-6), ("gradients", 5e-6), ("parameters", 2e-6)):
            assert found[key] < limit, (rank, key, found)


@pytest.mark.parametrize("name", CASES)
def test_trains_as_one_process(name: str, two: dict[str, list[Any]]) -> None:
    _check(two[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_train_as_one_process(name: str, more: dict[str, list[Any]]) -> None:
    _check(more[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_trains_as_one_process_on_four_ranks(name: str, four: dict[str, list[Any]]) -> None:
    _check(four[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("llama", "lora", mesh=TWO),
        Case("llama", "full", SEQUENCE, TWO),
        Case("llama", "full", {"gather_logits": False}, TWO),
        Case("llama", mesh={"cp": 2, "dp_shard": 1}),
    ],
    ids=["lora", "sequence", "sharded logits", "context"],
)
def test_compiles(case: Case) -> None:
    world = World(2)
    try:
        assert max(world(compiled, case)) < 1e-5
    finally:
        world.stop()


@pytest.mark.parametrize(
    "options",
    [{}, {"vocab_parallel": False}, {"gather_logits": False, "sequence_parallel": True}],
    ids=["vocabulary", "whole vocabulary", "sequence"],
)
def test_a_fused_loss_of_part_of_the_logits(options: dict[str, bool], ranks: World) -> None:
    for found in ranks(functools.partial(fused, "tp", **options)):
        assert max(found.values()) < 1e-6, found


def test_exchanges_are_megatrons(two: dict[str, list[Any]]) -> None:
    """Of each of two layers two all-reduces in each pass; one more for the embedding, and one for
    the input of the output head, whose logits are gathered."""
    found = two["llama"][0]["operators"]
    assert found == {"all_reduce": 2 * 2 + 1, "sum_gradient": 2 * 2 + 1, "all_gather": 1}


def test_exchanges_of_sequence_parallel(two: dict[str, list[Any]]) -> None:
    """The same places, each all-reduce in two halves; the norms' gradients once a layer."""
    found = two["qwen3, sequence"][0]["operators"]
    assert found["reduce_scatter"] == 2 * 2 + 1
    assert found["all_gather"] == 2 * 2 + 1 + 1
    assert found["sum_gradients"] == 2 + 1
    assert "all_reduce" not in found and "sum_gradient" not in found


@pytest.fixture
def eight() -> Iterator[Any]:
    """Rank 3 of eight that are not there: collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    try:
        yield lambda **sizes: make_mesh("cpu", **sizes)
    finally:
        dist.destroy_process_group()


def test_shapes_of_a_rank_of_a_large_model(eight: Any) -> None:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=2,
        num_attention_heads=64,
        num_key_value_heads=8,
        dtype=torch.bfloat16,
    )
    program = gt.capture(empty_model(config, torch.bfloat16))
    split = program.apply(LoRA(rank=16), TensorParallel(mesh=eight(tp=8)))
    shapes = {n: tuple(p.shape) for n, p in split.named_parameters() if ".1." in n or "embed" in n}
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    assert shapes["model.embed_tokens.weight"] == (16032, 8192)
    assert shapes[attention + "q_proj.weight"] == (1024, 8192)
    assert shapes[attention + "k_proj.weight"] == (128, 8192)
    assert shapes[attention + "o_proj.weight"] == (8192, 1024)
    assert shapes[mlp + "up_proj.weight"] == (3584, 8192)
    assert shapes[mlp + "down_proj.weight"] == (8192, 3584)
    assert shapes[attention + "k_proj.lora_A.default.weight"] == (16, 8192)
    assert shapes[attention + "k_proj.lora_B.default.weight"] == (128, 16)
    assert shapes[mlp + "down_proj.lora_A.default.weight"] == (16, 3584)
    assert shapes[mlp + "down_proj.lora_B.default.weight"] == (8192, 16)
    heads = [n for n in split.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert {node.meta["val"].shape[1] for node in heads} == {8}


@pytest.mark.parametrize(
    ("model", "sizes", "passes", "message"),
    [
        ("llama", {"tp": 4}, (), "tp=4 does not divide the 2 heads of model.layers.0.self_attn"),
        ("gpt2", {"tp": 8}, (), "tp=8 does not divide the 4 heads of transformer.h.0.attn"),
        ("llama", {"tp": 1}, (), "one rank to divide over"),
        ("llama", {"tp": 2}, (Quantize("nf4"),), "borders of blocks of 64"),
    ],
)
def test_refuses(
    eight: Any, model: str, sizes: dict[str, int], passes: tuple[Any, ...], message: str
) -> None:
    program = gt.capture(tiny_gpt2() if model == "gpt2" else tiny_model(model)).apply(*passes)
    with pytest.raises(UserError, match=message):
        program.apply(TensorParallel(mesh=eight(**sizes)))


def test_refuses_a_vocabulary_and_an_mlp_that_do_not_divide(eight: Any) -> None:
    config = Qwen2Config(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=50,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    program = gt.capture(empty_model(config, torch.float32))
    mesh = eight(tp=4)
    with pytest.raises(UserError, match="tp=4 does not divide the 50 outputs of .*gate_proj"):
        program.apply(TensorParallel(mesh=mesh))
    only_attention = TensorParallel(mesh=mesh, targets=("*.self_attn.*",))
    with pytest.raises(UserError, match="vocab_parallel.*the 101 tokens"):
        program.apply(only_attention)
    only_attention = TensorParallel(mesh=mesh, targets=("*.self_attn.*",), vocab_parallel=False)
    split = program.apply(only_attention)
    assert split.all_parameters()["model.layers.0.mlp.gate_proj.weight"].shape == (50, 32)
    assert split.all_parameters()["model.layers.0.self_attn.o_proj.weight"].shape == (32, 8)


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A model and its folder; only rank 0 of a world that there is would write it."""
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_reads_only_its_slices(saved: Any, eight: Any) -> None:
    """Weights on one rank are its parts of the file's, which the loader is told of."""
    model, folder = saved
    mesh = eight(tp=2, dp_shard=4)
    empty = gt.capture(gt.load_model(folder, device="meta")).apply(TensorParallel(mesh=mesh))
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = gt.load_weights(empty, device="cpu")
    assert loaded.distribution is not None
    parts = loaded.distribution.parts
    assert parts["model.layers.0.self_attn.k_proj.bias"][0].length == 8
    for name, whole in model.state_dict().items():
        expected = whole
        for part in parts.get(name, ()):
            expected = part.of(expected)
        assert torch.equal(loaded.state_dict()[name], expected), name
    reads = {fill.inputs[0]: fill.part for fill in empty.deferred.fills}
    assert reads["model.layers.1.mlp.down_proj.weight"].dim == 1


def test_a_mesh_that_is_not_the_world(eight: Any) -> None:
    with pytest.raises(UserError, match="tp=3.*must be the number of processes, 8"):
        eight(tp=3)


def test_without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphtune.distributed._mesh", None)
    with pytest.raises(UserError, match="needs several processes"):
        gt.capture(empty_model(GPT2Config(n_layer=1, n_embd=8, n_head=2), torch.float32)).apply(
            TensorParallel()
        )
