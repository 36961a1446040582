"""Tiny vision-language models, each with its processor, and talk of images."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from graphtune.data.messages import Message

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<start_of_image>"]
SPECIAL += ["<end_of_image>", "<image_soft_token>", "<fake_token_around_image>", "<global-img>"]
SPECIAL += ["<end_of_utterance>"]
TEMPLATE = (  # as Qwen 2 VL and SmolVLM write it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}"
    "{{ p.text }}{% endif %}{% endfor %}<|im_end|>{% endgeneration %}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VISION_CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
}


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user\nassistant\n\nWhat is it? A red fox.\n\n"] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", **options
    )


def llava(template: str) -> tuple[ProcessorMixin, Callable[[], PreTrainedModel]]:
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer(add_bos_token=True),  # which its template leaves to the tokenizer
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template.replace("IMAGE", "<image>"),
    )
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=len(processor.tokenizer), **TEXT_CONFIG),
        vision_config=CLIPVisionConfig(patch_size=8, projection_dim=16, **VISION_CONFIG),
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
    )
    return processor, lambda: LlavaForConditionalGeneration(config)


class ImagesOnly(Qwen2VLProcessor):
    """Without videos, whose processor needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def qwen2_vl(template: str) -> tuple[ProcessorMixin, Callable[[], PreTrainedModel]]:
    processor = ImagesOnly(
        Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=512),
        tokenizer(),
        chat_template=template.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "rope_parameters": rope,
            **TEXT_CONFIG,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return processor, lambda: Qwen2VLForConditionalGeneration(config)


def idefics3(template: str) -> tuple[ProcessorMixin, Callable[[], PreTrainedModel]]:
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
        tokenizer(),
        image_seq_len=4,
        chat_template=template.replace("IMAGE", "<image>"),
    )
    config = Idefics3Config(
        text_config=LlamaConfig(vocab_size=len(processor.tokenizer), **TEXT_CONFIG),
        vision_config={"patch_size": 4, **VISION_CONFIG},
        scale_factor=2,
        image_token_id=processor.image_token_id,
    )
    return processor, lambda: Idefics3ForConditionalGeneration(config)


def gemma3(template: str) -> tuple[ProcessorMixin, Callable[[], PreTrainedModel]]:
    tokens = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer(extra_special_tokens=tokens),
        image_seq_length=4,
        chat_template="<s>" + template.replace("IMAGE", "<start_of_image>"),
    )
    words = processor.tokenizer
    text = {"vocab_size": len(words), "head_dim": 8, "sliding_window": 64, **TEXT_CONFIG}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text),
        vision_config=SiglipVisionConfig(patch_size=4, **VISION_CONFIG),
        mm_tokens_per_image=4,
        image_token_id=words.image_token_id,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
    )
    return processor, lambda: Gemma3ForConditionalGeneration(config)


def smolvlm(template: str) -> tuple[ProcessorMixin, Callable[[], PreTrainedModel]]:
    """Idefics 3's processor, whose own needs that of videos, with the model of SmolVLM."""
    processor, make = idefics3(template)
    other = make().config.to_dict()
    del other["model_type"], other["vision_config"]["model_type"]
    return processor, lambda: SmolVLMForConditionalGeneration(SmolVLMConfig(**other))


FAMILIES = {"llava": llava, "qwen2_vl": qwen2_vl, "idefics3": idefics3, "gemma3": gemma3}
CAPTURED = {"gemma3": gemma3, "idefics3": idefics3, "llava": llava, "smolvlm": smolvlm}


def picture(width: int, height: int, seed: int = 0) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels)}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def talk(*turns: Any) -> list[Message]:
    """What the user and the assistant say in turn; a text, or parts."""
    roles = ("user", "assistant")
    return [Message(role=roles[i % 2], content=turn) for i, turn in enumerate(turns)]


def random_model(make: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """A model in which every part matters: as initialised, some parameters are zero."""
    torch.manual_seed(seed)
    model = make().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


RAGGED = [  # conversations with one image, two and none
    talk([picture(16, 16), words("What is it?")], "A red fox."),
    talk([picture(20, 30, 1), words("or"), picture(50, 18, 2)], "Both", "Sure?", "Yes."),
    talk("What is it?", "It is a fox."),
]


def theirs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model itself takes of a batch with one conversation in each row."""
    lengths = count_up(batch["position_ids"])
    kept = {n: v for n, v in batch.items() if n not in ("labels", "attention_mask", "weights")}
    return kept | {"attention_mask": lengths, "use_cache": False}


def count_up(positions: torch.Tensor) -> torch.Tensor:
    """1 for each token that is not padding, whose positions are 0."""
    mask = (positions > 0).long()
    mask[:, 0] = 1
    return mask


def loss_of(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's own mean loss over the labelled tokens of a batch."""
    logits = model(**theirs(batch)).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
