"""FSDP on two and four processes against one, its collectives counted, and 64 ranks on shapes."""

import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

import graphtune as gt
from graphtune.collectives import sum_gradients, unshard
from graphtune.distributed import make_mesh
from graphtune.engine import plan_hash
from graphtune.errors import UserError
from graphtune.inspect.memory import empty_batch, estimate
from graphtune.passes import FSDP, ActivationCheckpoint, LoRA, QLoRA
from tests.oracles.distributed_cases import (
    ADAPT,
    Case,
    adapted,
    alive_after_forward,
    batches,
    count_collectives,
    gradients_of,
    load_checkpoint,
    load_shards,
    order_of_operators,
    save_checkpoint,
    train,
    train_all,
    train_alone,
    train_fully_sharded,
)
from tests.oracles.models import assert_same_tensors
from tests.oracles.ranks import World

HSDP = {"dp_replicate": 2, "dp_shard": 2}
WHOLE_ADAPTERS = {"replicate": ("*lora_*",)}


@pytest.fixture(scope="module")
def two() -> Iterator[World]:
    started = World(2)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def four() -> Iterator[World]:
    started = World(4)
    yield started
    started.stop()


def assert_close(found: dict, alone: dict, atol: float = 1e-6) -> None:
    assert [m["tokens"] for m in found["metrics"]] == [m["tokens"] for m in alone["metrics"]]
    for mine, theirs in zip(found["metrics"], alone["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert found["state"].keys() == alone["state"].keys()
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=0, atol=atol, msg=name)


def test_two_ranks_are_one_process_bit_for_bit(two: World) -> None:
    # A sum of two gradients has one order, so that every bit can be asked for.
    cases = [
        *(Case(adapt=adapt) for adapt in ADAPT),
        Case(adapt="lora", options=WHOLE_ADAPTERS),
        Case(options={"reshard_after_forward": False}, steps=3),
        Case(options={"offload": True}, steps=3),
        Case(more=(ActivationCheckpoint("full"),), steps=3),
        Case(more=(ActivationCheckpoint("selective", layers=(0,)),), adapt="qlora", steps=3),
    ]
    runs = two(train_all, cases)
    for index, one in enumerate(cases):
        alone = train_alone(one, ranks=2)
        for rank in (0, 1):
            found = runs[rank][index]
            assert [m["loss"] for m in found["metrics"]] == [m["loss"] for m in alone["metrics"]]
            assert_same_tensors(found["state"], alone["state"])


@pytest.mark.parametrize(
    "cases",
    [
        [Case(adapt="lora", mesh=HSDP), Case(model="uneven", clip=0.5)],
        pytest.param(
            [
                *(Case(adapt=adapt, mesh=HSDP) for adapt in ADAPT if adapt != "lora"),
                Case(adapt="lora", mesh=HSDP, options=WHOLE_ADAPTERS),
                Case(model="llama"),  # tied
                Case(model="mixtral", steps=3),  # experts, of which there are as many as ranks
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["few", "more"],
)
def test_four_ranks_replicas_ties_and_uneven_shapes(four: World, cases: list[Case]) -> None:
    runs = four(train_all, cases)[3]
    for one, found in zip(cases, runs, strict=True):
        assert_close(found, train_alone(one, ranks=4))


@pytest.mark.slow  # a compiler on each rank
def test_a_compiled_step_is_that_of_one_process(two: World) -> None:
    one = Case(adapt="qlora", compile=True, steps=3)
    found, alone = two(train, one)[0], train_alone(Case(adapt="qlora", steps=3), ranks=2)
    assert_close(found, alone, atol=1e-5)
    forward, backward = two(count_collectives, Case(compile=True))[0]
    assert forward == Counter(gather=4)
    assert backward == Counter(gather=3, scatter=4)


@pytest.mark.slow  # a compiler on each rank
def test_a_compiled_step_computes_while_it_gathers(two: World) -> None:
    for order in two(order_of_operators, Case())[0]:
        assert re.search("g[^w]*m[^w]*w", order), order


# Two layers, the embedding before them, and norm and head after. The embedding's weight is not
# needed in the backward pass.
@pytest.mark.parametrize(
    "one, forward, backward",
    [
        (Case(), {"gather": 4}, {"gather": 3, "scatter": 4}),
        (Case(options={"reshard_after_forward": False}), {"gather": 4}, {"scatter": 4}),
        # Frozen weights in one gather, adapters in another; only these have gradients.
        (Case(adapt="lora"), {"gather": 6}, {"gather": 5, "scatter": 2}),
        (Case(adapt="lora", options=WHOLE_ADAPTERS), {"gather": 4}, {"gather": 3, "reduce": 2}),
        (Case(adapt="qlora"), {"gather": 6}, {"gather": 5, "scatter": 2}),
        # A layer that is computed again has its weights gathered there.
        (Case(more=(ActivationCheckpoint("full"),)), {"gather": 4}, {"gather": 3, "scatter": 4}),
    ],
    ids=["full", "kept", "lora", "whole adapters", "qlora", "checkpointed"],
)
def test_collectives(two: World, one: Case, forward: dict, backward: dict) -> None:
    assert two(count_collectives, one)[0] == [Counter(forward), Counter(backward)]


def test_replicas_add_one_all_reduce_to_each_scatter(four: World) -> None:
    counted = four(count_collectives, Case(mesh=HSDP))[0]
    assert counted == [Counter(gather=4), Counter(gather=3, scatter=4, reduce=4)]


def test_what_is_gathered_is_not_kept_for_the_backward_pass(two: World) -> None:
    kept, again = (
        two(alive_after_forward, Case(options={"reshard_after_forward": reshard}))[0]
        for reshard in (False, True)
    )
    program = adapted(Case())
    weights = sum(p.numel() * 4 for n, p in program.named_parameters() if "embed" not in n)
    assert kept - again >= 0.9 * weights


@pytest.mark.parametrize("reduce", ["float32", "bfloat16", None])
def test_mixed_precision_gathers_and_sums_in_its_dtypes(two: World, reduce: str | None) -> None:
    found = two(gradients_of, Case(options={"param_dtype": "bfloat16", "reduce_dtype": reduce}))[0]
    alone = adapted(Case())
    state = {name: p.detach().bfloat16().float() for name, p in alone.named_parameters()}
    each = []
    for batch in batches(2, 1)[0]:
        leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
        logits = torch.func.functional_call(alone, leaves, (batch["input_ids"],))
        loss = gt.losses.cross_entropy(logits, batch["labels"], None)
        each.append(torch.autograd.grad(loss, list(leaves.values())))
    dtype = torch.float32 if reduce == "float32" else torch.bfloat16
    for name, *parts in zip(state, *each, strict=True):
        first, second = (part.to(dtype) for part in parts)
        assert torch.equal(found[name], (first + second).float()), name


def test_fully_shard_gives_the_same_parameters(two: World) -> None:
    theirs = two(train_fully_sharded, "qwen2", 10)[0]
    ours = two(train, Case())[0]
    for mine, loss in zip(ours["metrics"], theirs["losses"], strict=True):
        assert mine["loss"] == pytest.approx(loss, rel=1e-6)
    for name, tensor in theirs["state"].items():
        torch.testing.assert_close(ours["state"][name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("passes", [(), (LoRA(rank=2),), (QLoRA(rank=2),)], ids=len)
def test_each_rank_reads_its_shards_alone(two: World, tmp_path, passes) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    torch.manual_seed(1)
    expected = gt.capture(gt.load_model(tmp_path)).apply(*passes)
    size = (tmp_path / "model.safetensors").stat().st_size
    for result in two(load_shards, str(tmp_path), passes):
        assert_same_tensors(result["state"], dict(expected.state_dict()))
        assert result["fingerprint"] == expected.info.fingerprint
        quantized = any(isinstance(one, QLoRA) for one in passes)
        # NF4 has a mean of the whole weight: of it, each tensor must be seen whole, in turn.
        assert result["read"] < (1.0 if quantized else 0.51) * size
        whole = sum(p.numel() * 4 for p in expected.parameters())
        assert result["held"] == pytest.approx(whole / 2, rel=0.01)


def test_checkpoints_are_dtensors_and_reshard(two: World, four: World, tmp_path) -> None:
    one = Case(model="uneven", adapt="lora")
    saved = four(save_checkpoint, one, str(tmp_path))[0]
    alone = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    dcp.load(alone, checkpoint_id=str(tmp_path), no_dist=True)
    assert_same_tensors(alone, saved)
    assert_same_tensors(two(load_checkpoint, one, str(tmp_path))[1], saved)


@pytest.fixture
def rank_5_of_64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("graphtune.distributed._mesh", None)  # put back afterwards
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=64)
    yield
    dist.destroy_process_group()


def llama_70b(layers: int) -> gt.Program:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return gt.capture(model)


def test_sixty_four_ranks_of_a_large_model(rank_5_of_64: None) -> None:
    program = llama_70b(2)
    mesh, other = make_mesh("cpu"), make_mesh("cpu", dp_replicate=4)
    sharded = program.apply(FSDP(mesh=mesh))
    shapes = {name: tuple(p.shape) for name, p in sharded.named_parameters()}
    assert shapes["model.embed_tokens.weight"] == (2004, 8192)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (16, 8192)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (128, 28672)
    assert shapes["model.norm.weight"] == (128,)
    for name, parameter in program.named_parameters():
        part = sharded.distribution.parts[name][0]
        assert (part.size, part.rank) == (parameter.shape[0], 5)
    gathers = sharded.graph.find_nodes(op="call_function", target=unshard)
    assert [node.args[-1] for node in gathers] == [
        "first",
        "model.layers.0",
        "model.layers.1",
        "after model.layers.1",
    ]
    hybrid = program.apply(FSDP(mesh=other))
    assert hybrid.get_parameter("model.norm.weight").shape == (512,)
    assert plan_hash(hybrid) != plan_hash(sharded)
    quantized = program.apply(QLoRA(rank=8), FSDP(mesh=mesh, replicate=("*lora_*",)))
    down = "model.layers.0.mlp.down_proj.weight_nf4"
    assert quantized.get_buffer(down).numel() == 8192 * 28672 // 2 // 64
    sums = quantized.graph.find_nodes(op="call_function", target=sum_gradients)
    assert len(sums) == 2  # the adapters of each layer


def test_bad_input(rank_5_of_64: None) -> None:
    with pytest.raises(UserError, match="dp_shard=3 .* must be the number of processes, 64"):
        make_mesh("cpu", dp_shard=3)
    program = adapted(Case())
    with pytest.raises(UserError, match="take data_parallel"):
        program.apply(FSDP(mesh=make_mesh("cpu", dp_replicate=64)))
    with pytest.raises(UserError, match="param_dtype=int8"):
        FSDP(param_dtype="int8")  # type: ignore[arg-type]
    mesh = make_mesh("cpu")
    with pytest.raises(UserError, match="nothing_*"):
        program.apply(FSDP(mesh=mesh, replicate=("nothing_*",)))


class _Devices(TorchDispatchMode):
    """The kinds of device of what each operator takes and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, frozenset[str]]] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.seen.add((str(op), frozenset(t.device.type for t in tensors if t.dim())))
        return result


@pytest.mark.parametrize("adapters", [(), (QLoRA(rank=2),)], ids=["full", "qlora"])
def test_offloaded_shards_go_to_the_device_and_their_gradients_come_back(
    rank_5_of_64: None, adapters: tuple
) -> None:
    program = llama_70b(2).apply(*adapters, FSDP(mesh=make_mesh("cpu"), offload=True))
    stay = program.distribution.offloaded
    assert stay >= {n for n, p in program.named_parameters() if p.requires_grad}
    with FakeTensorMode(), _Devices() as devices:
        tensors = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cpu" if name in stay else "meta")
            for name, t in (*program.named_parameters(), *program.named_buffers())
        }
        trained = [n for n, p in program.named_parameters() if p.requires_grad]
        for name in trained:
            tensors[name].requires_grad_()
        with torch.device("meta"):
            inputs = empty_batch(program, 1, 4)
        logits = torch.func.functional_call(program.graph_module, tensors, tuple(inputs))
        gradients = torch.autograd.grad(logits.sum(), [tensors[name] for name in trained])
    assert logits.device.type == "meta"
    assert {gradient.device.type for gradient in gradients} == {"cpu"}
    # On the CPU nothing is computed; what is there, is copied.
    on_cpu = {op for op, where in devices.seen if where == {"cpu"}}
    assert on_cpu <= {"aten.empty.memory_format", "aten.detach.default", "prim.device.default"}
    assert {op for op, where in devices.seen if len(where) == 2} == {"aten._to_copy.default"}


def test_offloaded_shards_stay_when_the_program_moves(rank_5_of_64: None) -> None:
    program = llama_70b(1).apply(LoRA(rank=2), FSDP(mesh=make_mesh("cpu"), offload=True))
    before = dict(program.named_parameters())
    program.to_empty(device="cpu")
    assert all(before[n] is p and p.is_meta for n, p in program.named_parameters())
    assert all(not b.is_meta for _, b in program.named_buffers())


def test_the_device_holds_no_offloaded_shards(rank_5_of_64: None) -> None:
    program, mesh = llama_70b(1), make_mesh("cpu", dp_shard=8, dp_replicate=8)
    here, away = (estimate(program.apply(FSDP(mesh=mesh, offload=o)), 1, 8) for o in (False, True))
    assert (away.parameters, away.gradients, away.optimizer) < (1000, 1000, 1000)
    assert here.parameters == pytest.approx(sum(p.numel() for p in program.parameters()) / 2, 0.01)
    assert away.total < here.total - here.optimizer  # copies of shards come and go
