"""`graphtune data`: what it shows is what would be trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import graphtune.cli.data  # noqa: F401  (registers itself)
from graphtune.cli import main
from graphtune.cli.data import pieces, summarize
from graphtune.data import Dataset, Example
from graphtune.data.batching import Batching
from graphtune.models import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
VISION_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<user>", "<assistant>", "<end>", "<image>"]
Show = Callable[..., tuple[str, str, int]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", chat_template=TEMPLATE
    )


@pytest.fixture
def config(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tokenizer.save_pretrained(tmp_path / "model")
    rows: list[dict[str, Any]] = [
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "[x]", "response": "\x1b[31m red"},
        {"prompt": "long", "response": "a" * 40},
        {"prompt": "p" * 40, "response": "lost"},
        {"prompt": "bad", "response": None},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
recipe: sft
output_dir: {tmp_path}/run
model: {{id: {tmp_path}/model}}
dataset:
  _component_: graphtune.data.builders.instruct
  source: {tmp_path}/rows.jsonl
  on_bad_row: skip
loader: {{batch_size: 2, length: 24}}
"""
    )
    return path


@pytest.fixture
def show(config: Path, capsys: pytest.CaptureFixture[str]) -> Show:
    def run(*words: str) -> tuple[str, str, int]:
        with pytest.raises(SystemExit) as stopped:
            main(["data", str(config), *words])
        captured = capsys.readouterr()
        return captured.out, captured.err, int(stopped.value.code or 0)

    return run


def test_samples_mark_what_is_learned(show: Show) -> None:
    out, _, code = show()
    assert code == 0
    assert "<user>Hi<end><assistant>⟦Hello<end>⟧" in out
    assert "<user>[x]<end><assistant>⟦\\x1b[31m red<end>⟧" in out  # no escapes of the data's own
    assert f"<user>long<end><assistant>⟦{'a' * 17}⟧" in out
    assert "example 0: 11 tokens, 6 learned" in out
    assert "3 examples, 51 tokens, 64.7% of them learned" in out
    assert "1 truncated, 1 dropped, 1 bad rows skipped" in out
    assert "2 batches in 1 shape (2 x 24), 46.9% padding" in out


def test_samples_are_chosen_by_number_and_seed(show: Show) -> None:
    none, _, _ = show("--samples", "0")
    assert "⟦" not in none and "3 examples" in none
    first = {show("--samples", "1", "--seed", str(seed))[0].split(":")[0] for seed in range(9)}
    assert first == {"example 0", "example 1", "example 2"}
    assert show("--samples", "2", "--seed", "1") == show("--samples", "2", "--seed", "1")


def test_colours_instead_of_brackets(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, _, _ = show()
    assert "\x1b[1;32mHello<end>\x1b[0m" in out
    assert "⟦" not in out
    assert "\x1b[31m red" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦Hello<end>⟧" in show()[0]


def test_numbers_for_a_machine(show: Show) -> None:
    out, _, _ = show("--json", "loader.mode=packed")
    figures = json.loads(out)
    assert figures == {
        "examples": 3,
        "skipped": 1,
        "dropped": 1,
        "truncated": 1,
        "tokens": 51,
        "learned": 33 / 51,
        "lengths": {
            "least": 11,
            "mean": 17.0,
            "median": 16.0,
            "p95": pytest.approx(23.2),
            "most": 24,
            "histogram": [[10, 11, 1], [12, 13, 0], [14, 15, 0], [16, 17, 1], [18, 19, 0]]
            + [[20, 21, 0], [22, 23, 0], [24, 25, 1]],
        },
        "batches": 2,
        "shapes": [[2, 24]],
        "padding": pytest.approx(1 - 51 / 96),
    }


def test_a_stream_shows_its_beginning(show: Show) -> None:
    out, _, code = show("dataset.streaming=true")
    assert code == 0
    assert "the first 3 examples of a stream" in out
    assert "1 truncated, 1 dropped, 1 bad rows skipped" in out


def test_errors_are_those_of_training(show: Show) -> None:
    out, err, code = show("dataset.on_bad_row=error")
    assert (out, code) == ("", 2)
    assert "rows.jsonl, row 5: response: must be text, not None" in err
    _, err, code = show("loader.lenght=3")
    assert code == 2 and "length" in err


def test_pairs_of_answers() -> None:
    def answer(size: int) -> Example:
        return Example(input_ids=[1] * size, labels=[-100, *[1] * (size - 1)])

    pairs = [
        {"chosen": answer(4), "rejected": answer(6)},
        {"chosen": answer(2), "rejected": answer(8)},
    ]
    dataset = Dataset.build(pairs, max_length=None)
    figures = summarize(dataset, Batching(mode="padded", batch_size=2, length=8))
    assert (figures["examples"], figures["tokens"], figures["learned"]) == (2, 20, 16 / 20)
    assert figures["lengths"]["histogram"] == [[10, 10, 2]]
    assert figures["padding"] == 1 - 20 / 32


@pytest.mark.parametrize("size", [1, 7, 300, 100_000])
def test_the_histogram_counts_all(size: int) -> None:
    lengths = [2, 2 + size // 3, 2 + size]
    examples = [Example(input_ids=[1] * n, labels=[1] * n) for n in lengths]
    dataset = Dataset.build(examples, max_length=None)
    figures = summarize(dataset, Batching(mode="padded", batch_size=1, length=2 + size))
    bins = figures["lengths"]["histogram"]
    assert len(bins) <= 12
    assert sum(count for _, _, count in bins) == 3
    assert bins[0][0] <= 2 <= bins[0][1] and bins[-1][0] <= 2 + size <= bins[-1][1]
    assert all(one[1] + 1 == other[0] for one, other in zip(bins, bins[1:], strict=False))


def test_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<user>" + "<image>" * 300 + "é is\t[1]<end><assistant> \x07Yes<end>"
    ids = tokenizer(text).input_ids
    labels = [-100] * len(ids)
    labels[-5:] = ids[-5:]
    assert list(pieces(tokenizer, ids, labels)) == [
        ("<user><image>(x300)é is\t[1]<end><assistant> ", False),
        ("\\x07Yes<end>", True),
    ]


def test_images_are_shown_as_what_they_become(show: Show, config: Path, tmp_path: Path) -> None:
    """The model's processor turns an image into its placeholders, none of which is learned."""
    tokenizer = load_tokenizer(tmp_path / "model")
    tokenizer.chat_template = VISION_TEMPLATE
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VISION_TEMPLATE,
    ).save_pretrained(tmp_path / "model")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    row = {
        "messages": [
            {"role": "user", "content": "<image>What?"},
            {"role": "assistant", "content": "Red"},
        ],
        "images": [str(tmp_path / "red.png")],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    text = config.read_text().replace("builders.instruct", "builders.chat")
    config.write_text(text.replace("loader: {", "loader: {mode: padded, ").replace("24}", "64}"))
    out, _, _ = show("--samples", "1")
    assert "<image>(x4)" in out
    assert "⟦Red<end>⟧" in out
    out, _, _ = show("--json")
    assert json.loads(out)["learned"] == pytest.approx(4 / json.loads(out)["tokens"])
