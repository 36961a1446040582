"""Conversations with images, against transformers' processors and models of four families."""

import json
import pickle
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ProcessorMixin

from graphtune.data import IGNORE_INDEX, Example
from graphtune.data.batching import Batching
from graphtune.data.builders import chat
from graphtune.data.fields import BadRow
from graphtune.data.loader import Loader
from graphtune.data.messages import Message
from graphtune.data.vision import ImageInputs, VisionEncoder, collate_images
from graphtune.errors import UserError
from tests.oracles.vision_models import (
    FAMILIES,
    TEMPLATE,
    picture,
    qwen2_vl,
    talk,
    tokenizer,
    words,
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def processor(family: str) -> ProcessorMixin:
    return FAMILIES[family](TEMPLATE)[0]


CONVERSATIONS = {
    "one image": talk([picture(16, 16), words("What is it?")], "A red fox."),
    "text first": talk([words("Is it "), picture(9, 40)], "It is.", "Sure?", "Yes."),
    "two images": talk([picture(20, 30, 1), words("or"), picture(50, 18, 2)], "Both"),
    "an image later": talk("Hello", "Hi.", [picture(30, 30), words("é 한국 😀")], "It is é 😀."),
    "no image": talk("What is it?", "It is a fox."),
    "a system message": [
        Message(role="system", content="Be kind."),
        *talk([picture(16, 16), words("?")], "A fox."),
    ],
}


def in_parts(messages: list[Message]) -> list[dict[str, Any]]:
    """As `apply_chat_template` of processors wants them."""
    return [
        {**m, "content": [words(m["content"])] if isinstance(m["content"], str) else m["content"]}
        for m in messages
    ]


def learned(tokenizer: Any, example: Example) -> list[str]:
    """The text of each unbroken run of tokens that carry labels."""
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX)
    return [tokenizer.decode([i for i, _ in run]) for labelled, run in runs if labelled]


def tensors(inputs: ImageInputs) -> dict[str, torch.Tensor]:
    """All of them as the processor returns them for one conversation."""
    batched = {name: tensor[None] for name, tensor in (inputs.tokens | inputs.rows).items()}
    return batched | inputs.flat


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_everything_is_what_transformers_makes(processor: ProcessorMixin, name: str) -> None:
    messages = CONVERSATIONS[name]
    example = VisionEncoder(processor)(messages)
    expected = processor.apply_chat_template(
        in_parts(messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"images_kwargs": {"return_tensors": "pt"}},
    )
    ids, mask = expected["input_ids"][0], expected["assistant_masks"][0]
    assert list(example["input_ids"]) == torch.as_tensor(ids).tolist()
    assert [label != IGNORE_INDEX for label in example["labels"]] == torch.as_tensor(mask).tolist()
    ours = tensors(example["images"])
    for key in expected:
        if key not in ("input_ids", "attention_mask", "assistant_masks"):
            assert torch.equal(ours[key], torch.as_tensor(expected[key])), key
    assert all(not ours[key].numel() for key in ours.keys() - expected.keys())


@pytest.mark.parametrize("marked", [True, False])
def test_labels_are_the_answers_and_their_ends(family: str, marked: bool) -> None:
    marks = ("{% generation %}", "{% endgeneration %}")
    template = TEMPLATE if marked else TEMPLATE.replace(marks[0], "").replace(marks[1], "")
    processor = FAMILIES[family](template)[0]
    encode = VisionEncoder(processor)
    for messages in CONVERSATIONS.values():
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert learned(processor.tokenizer, encode(messages)) == [f"{a}<|im_end|>" for a in answers]


def test_a_turn_that_begins_with_what_merges_with_its_prompt(processor: ProcessorMixin) -> None:
    encode = VisionEncoder(processor)
    messages = talk([picture(20, 30), words("?")], "\n A fox.", "Ok", "\n\nYes")
    example = encode(messages)
    assert learned(processor.tokenizer, example) == ["\n A fox.<|im_end|>", "\n\nYes<|im_end|>"]
    prompt = processor.apply_chat_template(
        in_parts(messages[:1]), add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    assert list(example["input_ids"])[: len(prompt)] == list(prompt)
    for says in example["images"].tokens.values():  # aligned with the tokens that there are now
        images = [int(token in processor.image_token_ids) for token in example["input_ids"]]
        assert says.tolist() == images


def test_images_are_never_learned(processor: ProcessorMixin) -> None:
    example = VisionEncoder(processor)(
        talk("Draw a fox", [words("Here:"), picture(20, 30), words("Good?")])
    )
    runs = learned(processor.tokenizer, example)
    brackets = ("<|vision_start|>", "<|vision_end|>")  # of a template's own, around an image
    for bracket in brackets:
        runs = [run.replace(bracket, "") for run in runs]
    assert runs == ["Here:", "Good?<|im_end|>"]
    images = example["images"]
    assert all(tensor.numel() for tensor in (images.flat | images.rows).values())


def pad_to(examples: list[Example], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.ones(len(examples), length, dtype=torch.long)
    mask = torch.zeros(len(examples), length, dtype=torch.long)
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        ids[row, :size] = torch.tensor(example["input_ids"])
        mask[row, :size] = 1
    return ids, mask


@torch.no_grad()
def test_logits_of_a_batch_are_those_of_each_conversation(family: str) -> None:
    processor, make = FAMILIES[family](TEMPLATE)
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # some are zero, so that images would not matter
        parameter += 0.02 * torch.randn_like(parameter)
    encode = VisionEncoder(processor)
    examples = [encode(messages) for messages in CONVERSATIONS.values()]
    length = max(len(example["input_ids"]) for example in examples) + 3
    ids, mask = pad_to(examples, length)
    inputs = collate_images([[example] for example in examples], length)
    together = model(input_ids=ids, attention_mask=mask, **inputs).logits
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        ids, mask = pad_to([example], size)
        own = collate_images([[example]], size)
        alone = model(input_ids=ids, attention_mask=mask, **own).logits[0]
        torch.testing.assert_close(together[row, :size], alone, atol=1e-5, rtol=1e-5)
        if "pixel_values" in own:  # the images matter
            own["pixel_values"] = own["pixel_values"].flip(-1) + 0.1
            other = model(input_ids=ids, attention_mask=mask, **own).logits[0]
            assert (other - alone).abs().max() > 1e-3


def test_rows_of_several_documents_and_of_none(processor: ProcessorMixin) -> None:
    encode = VisionEncoder(processor)
    one, two, none = (encode(CONVERSATIONS[n]) for n in ("one image", "two images", "no image"))
    plain = Example(input_ids=[5, 6, 7], labels=[5, 6, 7])  # of a data set without images
    rows = [[one, plain, two], [], [none, one]]
    length = sum(len(example["input_ids"]) for example in rows[0]) + 4
    batch = collate_images(rows, length)
    for name, says in one["images"].tokens.items():
        row = torch.cat([says, torch.zeros(3, dtype=says.dtype), two["images"].tokens[name]])
        assert batch[name].shape == (3, length)
        assert batch[name][0].tolist() == [*row.tolist(), 0, 0, 0, 0]
        assert not batch[name][1].any()
    for name in one["images"].flat:
        parts = [example["images"].flat[name] for example in (one, two, one)]
        assert torch.equal(batch[name], torch.cat(parts))
    for name in one["images"].rows:
        first, second = one["images"].rows[name], two["images"].rows[name]
        count = len(first) + len(second)
        assert batch[name].shape[:2] == (3, count)
        assert torch.equal(batch[name][0], torch.cat([first, second]))
        assert not batch[name][1].any()
        assert torch.equal(batch[name][2, : len(first)], first)
        assert not batch[name][2, len(first) :].any()


def test_a_batch_without_images(processor: ProcessorMixin) -> None:
    example = VisionEncoder(processor)(CONVERSATIONS["no image"])
    batch = collate_images([[example], [], [example]], 40)
    assert batch.keys() == example["images"].tokens.keys()
    assert collate_images([[Example(input_ids=[1], labels=[1])], []], 4) == {}


def test_the_images_themselves_are_what_the_field_says(tmp_path: Path) -> None:
    encode = VisionEncoder(FAMILIES["llava"](TEMPLATE)[0], image_dir=tmp_path)
    image = picture(16, 16)["image"]
    image.save(tmp_path / "a.png")
    one = encode(talk([{"type": "image", "image": "a.png"}, words("?")], "A fox."))
    other = encode(talk([{"type": "image", "image": image}, words("?")], "A fox."))
    assert torch.equal(one["images"].flat["pixel_values"], other["images"].flat["pixel_values"])
    with pytest.raises(BadRow, match=r"messages\[0\].content\[1\]: image .*b.png` does not exist"):
        encode(talk([words("?"), {"type": "image", "image": "b.png"}], "A fox."))
    with pytest.raises(BadRow, match=r"messages\[0\].content\[0\].image: it is missing"):
        encode(talk([{"type": "image"}, words("?")], "A fox."))


def test_tools_of_a_row_go_first() -> None:
    template = "{{ tools | map(attribute='name') | join if tools }}\n" + TEMPLATE
    processor = qwen2_vl(template)[0]
    encode = VisionEncoder(processor, tools=[{"name": "draw"}])
    rows = [{"messages": CONVERSATIONS["one image"]} for _ in range(2)]
    rows[1]["tools"] = [{"name": "paint"}]  # type: ignore[assignment]
    own = encode(CONVERSATIONS["one image"], tools=[{"name": "paint"}])
    assert str(processor.tokenizer.decode(own["input_ids"])).startswith("paint\n")
    built = chat(processor, source=rows, tools=[{"name": "draw"}])
    assert [list(example["input_ids"]) for example in built] == [
        encode(CONVERSATIONS["one image"])["input_ids"],
        own["input_ids"],
    ]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 3), (3, 50), (2000, 3)])
def test_odd_sizes(processor: ProcessorMixin, size: tuple[int, int]) -> None:
    try:
        example = VisionEncoder(processor)(talk([picture(*size), words("?")], "A fox."))
    except BadRow as error:
        assert error.field == "messages" and "\n" not in error.problem
    else:
        assert learned(processor.tokenizer, example) == ["A fox.<|im_end|>"]


@pytest.mark.parametrize("messages", [[], [3], [{"role": "user"}], talk([3, words("?")], "A fox.")])
def test_malformed_messages(messages: Any) -> None:
    encode = VisionEncoder(FAMILIES["gemma3"](TEMPLATE)[0])
    with pytest.raises(BadRow):
        encode(messages)


def test_text_that_contains_the_placeholder(processor: ProcessorMixin) -> None:
    encode = VisionEncoder(processor)
    placeholder = processor.image_token
    with pytest.raises(BadRow, match="messages: "):
        encode(talk([picture(16, 16), words(f"What is {placeholder}?")], "A fox."))


def test_the_key_names_what_decides() -> None:
    make = FAMILIES["llava"]
    key = VisionEncoder(make(TEMPLATE)[0]).key
    assert key == VisionEncoder(make(TEMPLATE)[0]).key
    assert key != VisionEncoder(make("<s>" + TEMPLATE)[0]).key
    assert key != VisionEncoder(make(TEMPLATE)[0], train_on="last").key
    assert key != VisionEncoder(make(TEMPLATE)[0], image_dir="pictures").key
    larger = make(TEMPLATE)[0]
    larger.image_processor.size = {"shortest_edge": 32}
    assert key != VisionEncoder(larger).key


def test_an_encoder_can_be_sent_to_other_processes() -> None:
    encode = VisionEncoder(FAMILIES["qwen2_vl"](TEMPLATE)[0])
    messages = CONVERSATIONS["two images"]
    assert pickle.loads(pickle.dumps(encode))(messages)["labels"] == encode(messages)["labels"]


def test_processors_that_cannot_serve() -> None:
    processor = FAMILIES["llava"](TEMPLATE)[0]
    processor.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        VisionEncoder(processor)
    with pytest.raises(UserError, match="takes no images"):
        VisionEncoder(tokenizer())


LLAVA_TEMPLATE = (  # in the manner of LLaVA 1.5's: images first, and strings are passed over
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_a_template_that_passes_over_strings() -> None:
    processor = FAMILIES["llava"](LLAVA_TEMPLATE)[0]
    messages = talk([words("What is it?"), picture(16, 16)], "A fox.", "Sure?", "Yes.")
    example = VisionEncoder(processor)(messages)
    expected = processor.apply_chat_template(in_parts(messages), tokenize=True, return_dict=True)
    assert list(example["input_ids"]) == expected["input_ids"][0]
    assert "What is it?" in processor.tokenizer.decode(example["input_ids"])
    assert [run.strip() for run in learned(processor.tokenizer, example)] == ["A fox.", "Yes."]


def test_a_template_without_images_is_refused(processor: ProcessorMixin) -> None:
    for template in ("chatml", "{% for m in messages %}{{ m.content }}\n{% endfor %}"):
        with pytest.raises(UserError, match="dataset.template: .* does not write images"):
            VisionEncoder(processor, template=template)


@pytest.mark.parametrize("family", ["idefics3", "gemma3"])
def test_everything_learned_but_images_and_weights(family: str) -> None:
    processor = FAMILIES[family](TEMPLATE)[0]
    messages = talk([picture(20, 30), words("?")], "A fox.", "Sure?", "Yes.")
    messages[1]["weight"] = 0.5
    example = VisionEncoder(processor, train_on="all")(messages)
    for id, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label == (IGNORE_INDEX if id in processor.image_token_ids else id)
    at = {0.5: [], 1.0: [], 0.0: []}
    for id, weight in zip(example["input_ids"], example["weights"], strict=True):
        at[weight].append(id)
    assert processor.tokenizer.decode(at[0.5]) == "A fox.<|im_end|>"
    assert set(at[0.0]) == set(processor.image_token_ids)
    last = VisionEncoder(processor, train_on="last")(messages)
    assert learned(processor.tokenizer, last) == ["Yes.<|im_end|>"]


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    picture(20, 30)["image"].save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    question = {"role": "user", "content": "<image>What is it?"}
    answer = {"role": "assistant", "content": "A fox."}
    part = {"type": "image", "image": "a.png"}
    return [
        {"messages": [question, answer], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": [part, part, words("?")]}, answer]},
        {"messages": [{**question, "content": "?"}, answer], "images": ["a.png"]},
        {"messages": [{**question, "content": "Hello"}, answer], "images": []},
        {"messages": [question, answer], "images": ["bad.png"]},
    ]


def test_a_data_set_of_rows(
    processor: ProcessorMixin, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    dataset = chat(processor, source=rows, image_dir=tmp_path, on_bad_row="skip")
    assert (len(dataset), dataset.skipped, dataset.dropped) == (4, 1, 0)
    encode = VisionEncoder(processor, image_dir=tmp_path)
    part = {"type": "image", "image": "a.png"}
    for index, content in enumerate(
        ([part, words("What is it?")], [part, part, words("?")], [part, words("?")], "Hello")
    ):
        expected, example = encode(talk(content, "A fox.")), dataset[index]
        assert list(example["input_ids"]) == list(expected["input_ids"])
        assert dataset.lengths[index] == len(expected["input_ids"])
        for name, tensor in tensors(expected["images"]).items():
            assert torch.equal(tensors(example["images"])[name], tensor)


def test_images_are_not_cut(
    processor: ProcessorMixin, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    lengths = chat(processor, source=rows[:4], image_dir=tmp_path).lengths
    fits = chat(
        processor, source=rows[:4], image_dir=tmp_path, max_length=int(sorted(lengths)[-1]) - 1
    )
    assert fits.dropped == 1
    assert sorted(fits.lengths) == sorted(lengths)[:-1]


def test_bad_rows_name_the_file_the_row_and_the_field(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    processor = FAMILIES["qwen2_vl"](TEMPLATE)[0]
    with pytest.raises(UserError, match=r"train.jsonl, row 5: messages\[0\].*bad.png` is not an"):
        chat(processor, source=path, image_dir=tmp_path)


@pytest.mark.parametrize("mode", ["padded", "packed", "padding_free"])
def test_batches_of_a_loader(
    processor: ProcessorMixin, rows: list[dict[str, Any]], tmp_path: Path, mode: Any
) -> None:
    dataset = chat(processor, source=rows[:4], image_dir=tmp_path)
    length = int(sum(dataset.lengths))
    batching = Batching(mode=mode, batch_size=3, length=length, shuffle=False)
    images = sum(len(row.get("images", "ab")) for row in rows[:4])
    counted = 0
    for batch in Loader(dataset, batching):
        for name in dataset[0]["images"].tokens:
            is_image = torch.isin(batch["input_ids"], torch.tensor(processor.image_token_ids))
            assert torch.equal(batch[name] == 1, is_image)
        if "image_grid_thw" in batch:
            counted += len(batch["image_grid_thw"])
        elif "pixel_attention_mask" in batch:  # an image in several crops, the last its whole
            assert len(batch["pixel_values"]) == len(batch["input_ids"])
            assert bool(batch["pixel_attention_mask"].any())
        elif "pixel_values" in batch:
            counted += len(batch["pixel_values"])
    assert counted in (0, images)
    assert counted or "rows" in {kind for kind, _ in VisionEncoder(processor)._layout.values()}
