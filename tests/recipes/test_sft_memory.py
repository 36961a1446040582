"""Runs that do not fit are refused, sizes are found that do, and running out is explained."""

import time

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import graphtune as gt
from graphtune.engine import TrainStep
from graphtune.passes import LoRA
from graphtune.recipes import sft
from graphtune.training import memory
from tests.oracles.command_line import graphtune


def with_free(monkeypatch, size):
    monkeypatch.setattr(memory, "available_memory", lambda device: size)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_that_cannot_fit_is_refused_before_loading(
    config, write, tmp_path, monkeypatch, capsys, compiled
):
    with_free(monkeypatch, 100_000)
    monkeypatch.setattr(sft, "load_weights", lambda *_, **__: pytest.fail("loaded"))
    assert graphtune("train", write(config), f"compile={compiled}") == 2
    said = capsys.readouterr().err
    assert "are free on cpu" in said
    assert ("loader.batch_size" in said) != compiled, "a compiled step's activations are not known"
    assert ("passes.qlora" in said) == compiled
    assert not (tmp_path / "run").exists()
    assert graphtune("train", write(config), "loader.batch_size=auto") == 2


@pytest.mark.parametrize("mode", ["packed", "padding_free"])
def test_auto_is_the_largest_batch_whose_estimate_fits(
    config, write, tmp_path, monkeypatch, capsys, mode
):
    """Also where memory does not rise as a line: a row that is twice as long attends four times."""
    config["loader"] |= {"mode": mode, "batch_size": "auto"}
    config["max_steps"] = 1
    seen = []

    class Found(Exception):
        pass

    def found(program, **_):
        seen.append(program)
        raise Found

    monkeypatch.setattr(sft, "load_weights", found)
    free, sizes, real = 6_000_000, [], memory.largest_batch

    def chosen(*given, **options):
        sizes.append(real(*given, **options))
        return sizes[-1]

    with_free(monkeypatch, free)
    monkeypatch.setattr("graphtune.recipes.job.largest_batch", chosen)
    assert graphtune("train", write(config)) == 1
    (program,), (size,) = seen, sizes

    def total(rows):
        return program.memory(*((1, rows * 64) if mode == "padding_free" else (rows, 64))).total

    assert total(size) <= 0.9 * free < total(size + 1)
    assert size > 1


def test_running_out_of_memory_says_what_to_lower(quick, write, tmp_path, monkeypatch, capsys):
    calls = []
    real = TrainStep.__call__

    def out(self, batch, **options):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return real(self, batch, **options)

    monkeypatch.setattr(TrainStep, "__call__", out)
    assert graphtune("train", write(quick)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("graphtune: error: out of memory") and "loader.batch_size=2" in said
    assert "Tried to allocate 2 GiB" in said and "8-bit optimizer" in said
    assert (tmp_path / "run" / "adapter").is_dir(), "what was learned is kept"


@pytest.mark.slow
def test_thirty_layers_are_estimated_in_seconds():
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    heads = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads))
    program = gt.capture(model).apply(LoRA(rank=8))
    start = time.process_time()
    memory.check_fits(program, (8, 512), torch.device("cpu"), compiled=True)
    assert time.process_time() - start < 10
