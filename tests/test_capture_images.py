"""Programs of vision-language models, against transformers' own models."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, ProcessorMixin

import graphtune as gt
from graphtune.data import Batch, collate, collate_packed
from graphtune.data.vision import VisionEncoder
from graphtune.engine import compile_step
from graphtune.errors import UserError
from graphtune.image_inputs import as_taken, with_images
from graphtune.losses import loss_sum
from graphtune.passes import ActivationCheckpoint, Full, FusedLoss, KVCache, LoRA, QLoRA
from graphtune.program import Program
from tests.oracles.models import tiny_model
from tests.oracles.vision_models import (
    CAPTURED,
    RAGGED,
    TEMPLATE,
    loss_of,
    picture,
    qwen2_vl,
    random_model,
    talk,
    theirs,
    words,
)

Captured = tuple[ProcessorMixin, PreTrainedModel, Program]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("idefics3", "llava")]


@pytest.fixture(scope="module", params=["gemma3", "smolvlm", *SLOW])
def captured(request: pytest.FixtureRequest) -> Captured:
    return _captured(request.param)


@pytest.fixture
def gemma3() -> Captured:
    return _captured("gemma3")


@functools.cache
def _captured(family: str) -> Captured:
    processor, make = CAPTURED[family](TEMPLATE)
    model = random_model(make)
    return processor, model, gt.capture(model, images=True)


@functools.cache
def _for_text(family: str) -> Program:
    return gt.capture(_captured(family)[1])


def encoded(processor: ProcessorMixin, talks: list[Any]) -> list[Any]:
    encode = VisionEncoder(processor)
    return [encode(messages) for messages in talks]


def logits(program: Program, batch: Batch) -> torch.Tensor:
    taken = as_taken(program, batch)
    names = ("input_ids", "attention_mask", "position_ids", *list(program.inputs)[3:])
    return program(**{name: taken[name] for name in names})


def assert_same_gradients(
    loss: torch.Tensor, program: torch.nn.Module, expected: torch.Tensor, model: torch.nn.Module
) -> None:
    others = dict(model.named_parameters())
    given = torch.autograd.grad(expected, list(others.values()), allow_unused=True)
    known = {name: g for name, g in zip(others, given, strict=True) if g is not None}
    ours = {name: p for name, p in program.named_parameters() if p.requires_grad}
    assert ours.keys() == known.keys()
    for name, found in zip(ours, torch.autograd.grad(loss, list(ours.values())), strict=True):
        torch.testing.assert_close(found, known[name], rtol=1e-5, atol=1e-5, msg=name)
    assert sum(bool(g.any()) for name, g in known.items() if "vision" in name) > 20


@pytest.mark.parametrize("talks", [RAGGED, RAGGED[:2] * 2, RAGGED[2:] * 2])
def test_loss_and_every_gradient_of_ragged_batches(captured: Captured, talks: list[Any]) -> None:
    processor, model, program = captured
    batch = collate(encoded(processor, talks))
    loss = loss_sum(program, as_taken(program, batch)) / (batch["labels"] != -100).sum()
    expected = loss_of(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    if talks != RAGGED[2:] * 2:  # without images theirs has no gradient for them, ours zeros
        assert_same_gradients(loss, program, expected, model)


def test_rows_of_several_documents(captured: Captured) -> None:
    processor, model, program = captured
    one, two, none = encoded(processor, RAGGED)
    length = sum(len(example["input_ids"]) for example in (one, two, none)) + 3
    found = logits(program, collate_packed([[two, none, one], [one]], length))
    start = 0
    for example in (two, none, one):
        end = start + len(example["input_ids"])
        alone = model(**theirs(collate([example]))).logits[0]
        torch.testing.assert_close(found[0, start:end], alone, rtol=1e-5, atol=1e-5)
        start = end


def test_text_alone(gemma3: Captured) -> None:
    _, model, program = gemma3
    ids = torch.arange(20, 44).view(2, 12)
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(program(ids), expected, rtol=1e-5, atol=1e-5)
    text = _for_text("gemma3")
    assert list(text.inputs) == ["input_ids", "attention_mask", "position_ids"]
    torch.testing.assert_close(text(ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_windows_hold_within_images_too() -> None:
    """Of Gemma 3, whose sliding layers see less of an image than it has tokens here."""
    processor, make = CAPTURED["gemma3"](TEMPLATE)
    config = make().config
    config.text_config.sliding_window = 3
    config.text_config.layer_types = ["sliding_attention", "full_attention"]
    model = random_model(lambda: type(make())(config))
    batch = collate(encoded(processor, RAGGED))
    expected = model(**theirs(batch)).logits
    found = logits(gt.capture(model, images=True), batch)
    mask = theirs(batch)["attention_mask"].bool()
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_a_program_in_a_file(captured: Captured, tmp_path: Path) -> None:
    processor, _, program = captured
    batch = collate(encoded(processor, RAGGED))
    again = gt.Program.load(program.save(tmp_path / "model.gt"))
    assert torch.equal(logits(again, batch), logits(program, batch))


def test_what_text_does_not_use_is_frozen(gemma3: Captured) -> None:
    _, model, _ = gemma3
    text = _for_text("gemma3").apply(Full())
    trained = {name for name, p in text.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(input_ids=torch.arange(20, 30)[None]).logits.sum().backward()
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}


PASSES = {
    "lora": [LoRA(rank=2)],
    "language": [LoRA(rank=2, targets=["*language_model*_proj"])],
    "qlora": [QLoRA(rank=2)],
    "all": [LoRA(rank=2), ActivationCheckpoint("full"), FusedLoss(chunks=2)],
}
SLOWLY = pytest.mark.slow
WAYS = [
    ("all", False),
    *(pytest.param(name, False, marks=SLOWLY) for name in ("lora", "language", "qlora")),
    *(pytest.param("all", how, marks=SLOWLY) for how in ("whole", "layers")),
    *(pytest.param(name, "whole", marks=SLOWLY) for name in ("lora", "qlora")),
]


@pytest.mark.parametrize(("name", "compile"), WAYS)
def test_passes_and_compilers(gemma3: Captured, name: str, compile: Any) -> None:
    torch.compiler.reset()
    processor, _, program = gemma3
    tuned = program.apply(*PASSES[name])
    for parameter_name, parameter in tuned.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
    plain = tuned  # of a rounded base, run without the compiler
    if name != "qlora":
        plain = program.apply(PASSES[name][0])
        plain.load_state_dict(tuned.state_dict())
    step = compile_step(tuned, torch.optim.SGD(tuned.trainable_parameters(), 0.0), compile=compile)
    for talks in (RAGGED, RAGGED[1:], RAGGED[:2] * 2):
        batch = collate(encoded(processor, talks))
        if compile:
            assert step.check(batch) < 1e-3
        found = step(batch)
        known = loss_sum(plain, as_taken(plain, batch)) / found["tokens"]
        assert found["loss"] == pytest.approx(known.item(), rel=1e-5)
    if compile == "whole":
        assert step.compilations == 1


def test_memory_counts_images(gemma3: Captured) -> None:
    _, _, program = gemma3
    of_images, of_text = (one.memory(batch=4, seq=64) for one in (program, _for_text("gemma3")))
    assert of_images.activations > of_text.activations


def test_what_cannot_be_captured() -> None:
    _, make = qwen2_vl(TEMPLATE)
    with pytest.raises(UserError, match="type 'qwen2_vl' cannot be captured yet; those of gemma3"):
        gt.capture(make(), images=True)
    with pytest.raises(UserError, match="type 'llama' takes no images"):
        gt.capture(tiny_model("llama"), images=True)


def test_batches_that_do_not_fit(gemma3: Captured) -> None:
    processor, _, program = gemma3
    batch = collate(encoded(processor, RAGGED))
    with pytest.raises(UserError, match="12 tokens that stand for images, and 2 images"):
        with_images(program, batch | {"pixel_values": batch["pixel_values"][:2]})
    with pytest.raises(UserError, match="images of 3 x 8 x 16 .*the model takes 3 x 16 x 16"):
        with_images(program, batch | {"pixel_values": batch["pixel_values"][:, :, :8]})
    with pytest.raises(UserError, match="holds images, which the program does not take"):
        with_images(_for_text("gemma3"), batch)
    with pytest.raises(UserError, match="`passes.kv_cache` does not know the inputs of images"):
        program.apply(KVCache(batch=1, length=32))


def test_images_that_are_filled_up() -> None:
    processor, _, program = _captured("smolvlm")
    batch = collate(encoded(processor, [talk([picture(16, 16), words("?")], "A fox.")]))
    batch["pixel_attention_mask"][:, :, :4] = 0
    with pytest.raises(UserError, match="fills up images to one size"):
        with_images(program, batch)
