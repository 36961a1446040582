"""What a rank exchanges: counted, by the theory of the program, and by closed forms of shapes."""

import functools
import json
import resource
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import graphtune as gt
from graphtune.distributed import is_spread, pretended
from graphtune.errors import UserError
from graphtune.inspect.theory import expected
from graphtune.inspect.traffic import Amount, Exchange, Traffic, traffic
from graphtune.losses import ContextParallelCrossEntropy, VocabParallelCrossEntropy
from graphtune.passes import (
    FSDP,
    ActivationCheckpoint,
    ContextParallel,
    DataParallel,
    Full,
    FusedLoss,
    LoRA,
    Quantize,
    TensorParallel,
)
from graphtune.program import Program
from tests.oracles.models import FAMILIES
from tests.oracles.tensor_cases import _model

ADAPT = {
    "full": (Full(),),
    "lora": (LoRA(rank=4),),
    "qlora": (Quantize("nf4"), LoRA(rank=4)),
}
MAKE = {
    "dp": DataParallel,
    "fsdp": FSDP,
    "kept": functools.partial(FSDP, reshard_after_forward=False),
    "bf16": functools.partial(FSDP, param_dtype="bfloat16", reduce_dtype="float32"),
    "tp": TensorParallel,
    "own logits": functools.partial(TensorParallel, gather_logits=False),
    "sp": functools.partial(TensorParallel, sequence_parallel=True),
    "cp": ContextParallel,
    "checkpoint": functools.partial(ActivationCheckpoint, "full"),
    "fused": functools.partial(FusedLoss, 3),
}
BATCH, SEQ, RANKS = 2, 11, 2


@functools.cache
def whole(adapt: str, model: str = "wide") -> Program:
    return gt.capture(_model(model).to("meta")).apply(*ADAPT[adapt])


def both(adapt: str, mesh: dict[str, int], *names: str) -> tuple[Traffic, Traffic]:
    """Counted, and by theory."""
    program = whole(adapt)
    with pretended(mesh):
        split = program.apply(*(MAKE[name]() for name in names))
        loss = None
        if "cp" in names:
            loss = ContextParallelCrossEntropy()
        elif "own logits" in names:
            loss = VocabParallelCrossEntropy()
        return (
            traffic(split, BATCH, SEQ, loss=loss),
            expected(program, split, BATCH, SEQ),
        )


CASES = [
    ({"dp_shard": 4}, ("dp",)),
    ({"dp_shard": 4}, ("fsdp", "checkpoint")),
    ({"dp_shard": 4}, ("kept",)),
    ({"dp_replicate": 2, "dp_shard": 4}, ("bf16",)),
    ({"tp": 2}, ("tp", "checkpoint")),
    ({"tp": 2}, ("own logits",)),
    ({"tp": 2, "dp_shard": 2}, ("sp", "dp")),
    ({"cp": 2}, ("cp", "dp")),
    ({"tp": 2, "dp_shard": 2}, ("tp", "fsdp")),
    ({"tp": 2, "cp": 2, "dp_shard": 2}, ("tp", "cp", "fsdp", "checkpoint")),
    ({"tp": 2, "dp_shard": 2}, ("sp", "fsdp", "fused")),
]
FAST = [("qlora", CASES[1]), ("lora", CASES[6]), ("full", CASES[10])]


@pytest.mark.parametrize(
    ("adapt", "case"),
    [
        pytest.param(
            adapt,
            case,
            id=f"{adapt} {' '.join(case[1])}",
            marks=[] if (adapt, case) in FAST else pytest.mark.slow,
        )
        for adapt in ADAPT
        for case in CASES
    ],
)
def test_counted_as_theory_says(adapt: str, case: tuple) -> None:
    mesh, names = case
    counted, theory = both(adapt, mesh, *names)
    assert counted and counted == theory


def test_adapters_that_cast_and_drop_their_input_send_no_more() -> None:
    model = _model("wide").to("meta", torch.bfloat16)
    program = gt.capture(model).apply(LoRA(rank=4, dropout=0.1))  # float32
    with pretended({"tp": 2}):
        split = program.apply(TensorParallel())
        assert traffic(split, BATCH, SEQ) == expected(program, split, BATCH, SEQ)


def test_by_closed_forms() -> None:
    """Of two layers of width 128, with as many heads for keys as for queries, all in float32."""
    weights = {name: p.numel() * 4 for name, p in whole("full").named_parameters()}
    table = weights["model.embed_tokens.weight"]  # not tied to the head: `.to` meta parts them
    tokens = BATCH * SEQ * 128 * 4
    fsdp, _ = both("full", {"dp_shard": 4}, "fsdp")
    everything = sum(weights.values())
    assert fsdp == {
        Exchange("forward", "dp_shard", "all-gather"): Amount(4, everything),
        Exchange("backward", "dp_shard", "all-gather"): Amount(3, everything - table),
        Exchange("backward", "dp_shard", "reduce-scatter"): Amount(4, everything),
    }
    dp, _ = both("full", {"dp_shard": 4}, "dp")
    (amount,) = dp.values()
    assert amount.bytes == sum(weights.values())
    assert amount.sent("all-reduce", 4) == sum(weights.values()) * 2 * 3 // 4
    tp, _ = both("full", {"tp": 2}, "tp")
    assert tp == {
        Exchange("forward", "tp", "all-reduce"): Amount(5, 5 * tokens),  # the embedding, too
        Exchange("forward", "tp", "all-gather"): Amount(1, BATCH * SEQ * 128 * 4),  # the logits
        Exchange("backward", "tp", "all-reduce"): Amount(5, 5 * tokens),  # the head, too
    }
    cp, _ = both("full", {"cp": 2}, "cp", "dp")
    assert cp[Exchange("forward", "cp", "all-gather")] == Amount(4, 4 * BATCH * 12 * 128 * 4)


def test_a_mesh_is_pretended_for_a_while() -> None:
    with pretended({"dp_shard": 8, "tp": 2}) as mesh:
        assert is_spread() and mesh.size() == 16 and mesh.get_rank() == 0
        with pytest.raises(UserError, match="one of several"), pretended({"tp": 2}):
            pass
    assert not is_spread() and not dist.is_initialized()
    with pytest.raises(UserError, match="must be the number of processes"), pretended({"tp": 0}):
        pass


def test_a_tied_vocabulary_is_divided_once() -> None:
    config = FAMILIES["llama"]()  # tied
    config.vocab_size = 126  # of which half is odd
    with torch.device("meta"):
        program = gt.capture(AutoModelForCausalLM.from_config(config))
    with pretended({"tp": 2}):
        split = program.apply(TensorParallel())
    assert split.get_parameter("model.embed_tokens.weight").shape[0] == 63


@pytest.mark.slow
def test_seventy_billion_on_sixty_four_ranks() -> None:
    words = ["inspect", "llama3_1/70B_lora", "passes.fsdp={}", "--mesh", "dp=32,tp=2"]
    words += ["model.dtype=bfloat16", "--json"]  # whatever is fast here
    done = subprocess.run([sys.executable, "-m", "graphtune", *words], capture_output=True)
    assert done.returncode == 0, done.stderr
    mesh = json.loads(done.stdout)["mesh"]
    assert mesh["ranks"] == 64
    assert all(row["bytes"] == row["theory_bytes"] for row in mesh["exchanges"])
    assert mesh["memory"]["parameters"] < 70e9 * 2 / 64 * 1.1
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 8e9
