"""What activation checkpointing saves is what it says, and its gradients are those without it."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

import graphtune as gt
from graphtune.losses import loss_sum
from graphtune.passes import ActivationCheckpoint, Full, LoRA, Quantize
from graphtune.recomputation import as_tagged, by_region, offloaded
from tests.oracles.models import random_ids, tiny_gpt2, tiny_model
from tests.oracles.saved import saved_tensors

METHODS = {
    "lora": (LoRA(rank=2),),
    "qlora": (Quantize(format="int8"), LoRA(rank=2)),
    "full": (Full(),),
}


def tuned(base, method, **options):
    """The base program with a method's passes, and with checkpointing if there are options."""
    torch.manual_seed(1)
    passes = METHODS[method] + ((ActivationCheckpoint(**options),) if options else ())
    program = base.apply(*passes)
    with torch.no_grad():  # an adapter that starts as nothing would hide its inputs' gradients
        for name, parameter in program.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return program


def batch(length=16):
    ids = random_ids(2, length)
    return {"input_ids": ids, "labels": ids}


def make_step(program):
    optimizer = torch.optim.SGD(program.trainable_parameters(), lr=0.1)
    return gt.compile_step(program, optimizer, compile=False)


def compiled(program, data, seed=3):
    """Gradients and saved tensors of a step that is partitioned as inductor's, but not lowered."""
    torch._dynamo.reset()
    step = make_step(program)
    run = torch.compile(
        partial(loss_sum, program), backend="aot_eager_decomp_partition", fullgraph=True
    )
    own = (*program.parameters(), *program.buffers(), *data.values())
    torch.manual_seed(seed)
    with as_tagged(program):
        loss, saved = saved_tensors(lambda: run(data), own)
    return torch.autograd.grad(loss, step.parameters), saved


def size(saved):
    return sum(tensor.untyped_storage().nbytes() for tensor in saved)


def uncompiled(program, data, seed=3):
    step = make_step(program)
    torch.manual_seed(seed)
    return torch.autograd.grad(step.loss_sum(data), step.parameters)


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def assert_modes_agree(base, method, data):
    expected, nothing = compiled(tuned(base, method), data)
    sizes = [size(nothing)]
    for mode in ("none", "selective", "full"):
        found, saved = compiled(tuned(base, method, mode=mode), data)
        assert_equal(found, expected)
        sizes.append(size(saved))
    assert sizes[0] == sizes[1] > 1.5 * sizes[2] > 2 * sizes[3]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_a_compiled_step_saves_less_and_has_the_same_gradients(family, method):
    assert_modes_agree(gt.capture(tiny_model(family)), method, batch())


@pytest.mark.slow
def test_packed_rows_keep_to_themselves():
    segments = torch.tensor([[0] * 5 + [1] * 11, [0] * 9 + [1] * 7])
    mask = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
    positions = torch.cat([torch.arange(5), torch.arange(11), torch.arange(9), torch.arange(7)])
    data = batch() | {"attention_mask": mask, "position_ids": positions.view(2, 16)}
    base = gt.capture(tiny_model("llama"))
    assert_modes_agree(base, "lora", data)
    assert_equal(
        uncompiled(tuned(base, "lora", mode="full"), data), uncompiled(tuned(base, "lora"), data)
    )


def test_only_the_inputs_of_layers_are_saved():
    """Full: per layer its input, and of the whole what the head and the loss need."""
    program = tuned(gt.capture(tiny_model("llama")), "qlora", mode="full")
    _, saved = compiled(program, batch(10))
    wide = [tensor for tensor in saved if tensor.shape == (2, 10, 32)]
    assert len(wide) == 3  # into layer 0, into layer 1, out of it
    weights = {tuple(p.shape) for p in gt.capture(tiny_model("llama")).parameters()} - {(32,)}
    assert not [t for t in saved if tuple(t.shape) in weights | {s[::-1] for s in weights}]


@pytest.mark.slow
def test_no_dequantized_weight_is_saved_with_a_rule_that_names_all():
    program = tuned(gt.capture(tiny_model("llama")), "qlora", save=["self_attn", "mlp"])
    _, saved = compiled(program, batch(10))
    assert not {tuple(t.shape) for t in saved} & {(32, 32), (48, 32), (32, 48), (16, 32), (32, 16)}


@pytest.mark.slow
def test_a_smaller_budget_saves_less():
    base, data, sizes = gt.capture(tiny_model("llama")), batch(), []
    expected, nothing = compiled(tuned(base, "lora"), data)
    for budget in (1.0, 0.6, 0.3, 0.0):
        found, saved = compiled(tuned(base, "lora", mode="budget", budget=budget), data)
        assert_equal(found, expected)
        sizes.append(size(saved))
    assert sizes[0] == size(nothing)
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[2] < 0.5 * sizes[0]


_slow = [pytest.param(family, marks=pytest.mark.slow) for family in ("gemma3", "qwen3_moe")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", *_slow])
def test_without_a_compiler_layers_run_again(family, method):
    """gpt2 has dropout of three kinds: what runs again must drop the same numbers."""
    base = gt.capture(tiny_gpt2(dropout=0.2) if family == "gpt2" else tiny_model(family))
    expected = uncompiled(tuned(base, method), batch())
    for options in ({"mode": "selective"}, {"mode": "full"}, {"mode": "budget", "budget": 0.5}):
        assert_equal(uncompiled(tuned(base, method, **options), batch()), expected)


def test_without_a_compiler_less_is_alive_between_the_passes():
    base, alive = gt.capture(tiny_model("llama")), {}
    for mode in ("none", "selective", "full"):
        program = tuned(base, "qlora", mode=mode)
        alive[mode] = _alive_after_forward(make_step(program), batch(48))
    assert alive["none"] > 1.5 * alive["selective"] > 2 * alive["full"]


def _alive_after_forward(step, data):
    from graphtune.inspect.memory import _Live

    with _Live() as live:
        loss = step.loss_sum(data)
        now = live.now
    assert loss.requires_grad
    return now


def test_what_runs_by_region_sees_the_modes_and_the_tensors_of_the_program():
    program = tuned(gt.capture(tiny_gpt2(dropout=0.5)), "lora", mode="full")
    ids = random_ids(2, 8)
    other = by_region(program)
    assert torch.equal(program.eval()(ids), other(ids))
    program.train()
    assert not torch.equal(other(ids), other(ids))
    with torch.no_grad():
        program.get_parameter("transformer.wte.weight").mul_(2)
    assert torch.equal(program.eval()(ids), other(ids))
    plain = gt.capture(tiny_gpt2())
    assert by_region(plain) is plain


@pytest.mark.slow
def test_a_compiled_step_drops_the_same_numbers_again():
    base, data = gt.capture(tiny_gpt2(dropout=0.2)), batch()
    expected, _ = compiled(tuned(base, "full"), data)
    for mode in ("selective", "full"):
        assert_equal(compiled(tuned(base, "full", mode=mode), data)[0], expected)
    others, _ = compiled(tuned(base, "full", mode="full"), data, seed=4)
    assert not torch.equal(others[0], expected[0])


@pytest.mark.slow
def test_inductor_drops_the_same_numbers_again():
    base, found = gt.capture(tiny_gpt2(dropout=0.3)), {}
    for mode in ("none", "full"):
        torch._dynamo.reset()
        program = tuned(base, "full", mode=mode)
        step = gt.compile_step(program, torch.optim.SGD(program.trainable_parameters(), lr=0.1))
        for seed in (5, 6):
            torch.manual_seed(seed)
            found[mode, seed] = torch.autograd.grad(step.loss_sum(batch()), step.parameters)
    for one, other in zip(found["full", 5], found["none", 5], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["full", 6][0], found["full", 5][0], rtol=1e-2)


_IN_A_PROCESS = """
import json, sys, torch
import graphtune as gt
from graphtune.passes import ActivationCheckpoint, LoRA
from tests.oracles.models import random_ids, tiny_model
from tests.oracles.saved import saved_tensors
base, ids = gt.capture(tiny_model("llama")), random_ids(2, 16)
for mode in sys.argv[1:]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    program = base.apply(LoRA(rank=2), ActivationCheckpoint(mode))
    step = gt.compile_step(program, torch.optim.SGD(program.trainable_parameters(), lr=0.0))
    own = [*program.parameters(), *program.buffers(), ids]
    loss, saved = saved_tensors(lambda: step.loss_sum({"input_ids": ids, "labels": ids}), own)
    loss.backward()  # an entry is written once both halves are compiled
    size = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    hits = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
    print(json.dumps([mode, size, hits]))
"""


@pytest.mark.slow
def test_modes_never_share_what_is_compiled(tmp_path):
    """Neither in one process nor through the cache on disk, whichever comes first."""

    def sizes(*modes):
        root = Path(gt.__file__).parents[1]
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        command = [sys.executable, "-c", _IN_A_PROCESS, *modes]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment, cwd=root
        )
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]

    cold = sizes("none", "full")
    assert [hits for _, _, hits in cold] == [0, 0]
    assert cold[0][1] > 2 * cold[1][1]
    assert sizes("full", "none") == [["full", cold[1][1], 1], ["none", cold[0][1], 1]]


def policies(**options):
    program = gt.capture(tiny_model("llama")).apply(ActivationCheckpoint(**options))
    tags: dict[str, list] = {}
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {"": ("", "")}
        name = f"{list(stack.values())[-1][0]} {getattr(node.target, '__name__', node.target)}"
        tags.setdefault(name, []).append(node.meta.get("recompute"))
    return tags


SAVE, AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE
LAYER = "model.layers.0"


def test_what_is_dear_is_saved():
    tags = policies()
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        assert tags[f"{LAYER}.{name} linear.default"] == [SAVE]
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        assert tags[f"{LAYER}.{name} linear.default"] == [AGAIN]
    assert tags[f"{LAYER}.self_attn scaled_dot_product_attention.default"] == [SAVE]
    assert tags[f"{LAYER}.mlp.act_fn silu.default"] == [AGAIN]
    assert tags["lm_head linear.default"] == [None]


def test_rules_name_modules_and_operators():
    tags = policies(save=["layers.0.mlp.up_proj", "silu"], recompute=["self_attn", "mlp"])
    assert tags[f"{LAYER}.mlp.up_proj linear.default"] == [SAVE]
    assert tags["model.layers.1.mlp.up_proj linear.default"] == [AGAIN]
    assert tags[f"{LAYER}.mlp.act_fn silu.default"] == [SAVE]
    assert tags[f"{LAYER}.self_attn.q_proj linear.default"] == [AGAIN]
    assert tags[f"{LAYER}.self_attn scaled_dot_product_attention.default"] == [AGAIN]


def test_layers_are_chosen():
    tags = policies(mode="full", layers=[1])
    assert tags["model.layers.0.mlp.act_fn silu.default"] == [None]
    assert tags["model.layers.1.mlp.act_fn silu.default"] == [AGAIN]


def test_a_saved_program_keeps_it(tmp_path):
    for options in ({"mode": "selective"}, {"mode": "budget", "budget": 0.25}):
        program = gt.capture(tiny_model("llama")).apply(ActivationCheckpoint(**options))
        loaded = gt.Program.load(program.save(tmp_path / "model.gt"))
        for one, other in zip(program.graph.nodes, loaded.graph.nodes, strict=True):
            assert one.meta.get("recompute") == other.meta.get("recompute")
            assert one.meta.get("ac_graph_id") == other.meta.get("ac_graph_id")
            assert one.meta.get("custom", {}) == other.meta.get("custom", {})


def test_the_program_it_was_applied_to_is_as_before():
    base = gt.capture(tiny_model("llama"))
    base.apply(ActivationCheckpoint("budget", budget=0.5))
    assert not [node for node in base.graph.nodes if "recompute" in node.meta]
    assert not [n for n in base.graph.nodes if "memory_budget" in n.meta.get("custom", {})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "selectiv"}, "must be one of none, full"),
        ({"mode": "budget"}, "goes with `mode=budget`"),
        ({"budget": 0.5}, "goes with `mode=budget`"),
        ({"mode": "budget", "budget": 1.5}, "from 0 to 1"),
        ({"mode": "full", "save": ["mlp"]}, "for `mode=selective`"),
        ({"mode": "budget", "budget": 0.5, "layers": [0]}, "does not go with"),
        ({"save": ["up_prj"]}, r"activation_checkpoint.save`.*nearest: up_proj"),
        ({"recompute": ["slu"]}, r"activation_checkpoint.recompute`.*nearest: silu"),
        ({"layers": [2]}, r"activation_checkpoint.layers=\[2\]`: the model has layers 0..1"),
        ({"mode": "offload"}, "where they are already"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(gt.UserError, match=message):
        gt.capture(tiny_model("llama")).apply(ActivationCheckpoint(**options))


def test_it_is_applied_once():
    program = gt.capture(tiny_model("llama")).apply(ActivationCheckpoint())
    with pytest.raises(gt.UserError, match="cannot follow"):
        program.apply(ActivationCheckpoint("full"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="moves tensors off a GPU")
def test_saved_tensors_wait_in_the_memory_of_the_cpu():
    weight = torch.randn(64, 64, device="cuda", requires_grad=True)
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    expected = torch.autograd.grad((x @ weight).tanh().sum(), (x, weight))
    before = torch.cuda.memory_allocated()
    with offloaded([weight]):
        result = (x @ weight).tanh().sum()
    assert torch.cuda.memory_allocated() - before < weight.nbytes
    assert_equal(torch.autograd.grad(result, (x, weight)), expected)
