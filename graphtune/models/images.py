"""Models that take images: what of them a graph takes, and what of their code no graph can hold.

Every image that comes to such a graph has the one size that its model was trained for, and stands
for the same number of tokens, so that the images of all rows lie end to end in one tensor. What
comes after the last is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from graphtune.errors import UserError

PIXELS = "pixel_values"
TOKEN_TYPES = "token_type_ids"
IMAGE_INPUTS = (PIXELS, TOKEN_TYPES)
"""What a graph of a model that takes images may take besides ids, mask and positions."""


@dataclass(frozen=True)
class ImageModel:
    """How a model takes images.

    Attributes:
        token_id: the token that stands for a part of an image.
        tokens: how many of them stand for an image.
        size: channels, height and width of every image.
        token_types: whether it is told which tokens are an image's, since those see each other.
    """

    token_id: int
    tokens: int
    size: tuple[int, int, int]
    token_types: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a graph takes besides ids, mask and positions: `pixel_values`, float32 (images,
        channels, height, width), and perhaps `token_type_ids`, int64 (batch, seq), 1 for an
        image's token."""
        return IMAGE_INPUTS if self.token_types else (PIXELS,)

    def blank(self, input_ids: Tensor, images: int = 2) -> dict[str, Tensor]:
        """The inputs by name of a batch of text, see `blank_images`."""
        return blank_images(self.inputs, self.size, input_ids, images)


def blank_images(
    names: Sequence[str], size: Sequence[int], input_ids: Tensor, images: int = 2
) -> dict[str, Tensor]:
    """What a graph of a model that takes images is given with text: images that no token stands
    for.

    Args:
        names: of the graph's inputs for images.
        size: channels, height and width.
        input_ids: int64 (batch, seq), on the device that the inputs go to.
        images: how many; at least 2, as symbolic sizes have to be.
    """
    made: dict[str, Tensor] = {}
    for name in names:
        if name == PIXELS:
            made[name] = torch.zeros(images, *size, device=input_ids.device)
        else:
            made[name] = torch.zeros_like(input_ids)
    return made


def image_model(config: Any) -> ImageModel:
    """How the model of a `transformers` configuration takes images.

    Raises:
        UserError: it takes none, or in a way that a graph cannot.
    """
    kind = getattr(config, "model_type", None)
    if not hasattr(config, "vision_config"):
        raise UserError(f"model.id: a model of type {kind!r} takes no images; use one that does")
    if kind not in _KINDS:
        raise UserError(
            f"model.id: images of a model of type {kind!r} cannot be captured yet; those of "
            f"{', '.join(_KINDS)} can"
        )
    return _KINDS[kind](config)


def _size(config: Any) -> tuple[int, int, int]:
    vision = config.vision_config
    return vision.num_channels, vision.image_size, vision.image_size


def _patches(config: Any) -> int:
    return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2


def _gemma3(config: Any) -> ImageModel:
    tokens = config.mm_tokens_per_image
    return ImageModel(config.image_token_id, tokens, _size(config), token_types=True)


def _idefics3(config: Any) -> ImageModel:
    return ImageModel(
        config.image_token_id, _patches(config) // config.scale_factor**2, _size(config)
    )


def _llava(config: Any) -> ImageModel:
    tower = config.vision_config.model_type
    if tower not in ("clip_vision_model", "siglip_vision_model"):
        raise UserError(
            f"model.id: LLaVA with a vision model of type {tower!r} takes images of any size, "
            "which cannot be captured yet; those with CLIP or SigLIP can"
        )
    tokens = _patches(config) + (tower == "clip_vision_model")  # CLIP has one for the whole image
    if config.vision_feature_select_strategy == "default":
        tokens -= 1
    return ImageModel(config.image_token_id, tokens, _size(config))


_KINDS: dict[str, Callable[[Any], ImageModel]] = {
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "llava": _llava,
    "smolvlm": _idefics3,
}


# Stand-ins for methods of `transformers`, for the time of an export.


def _idefics3_features(self: Any, pixel_values: Tensor, *_: Any, **__: Any) -> Any:
    """Without leaving out images that are padding: there are none, and all are of full size."""
    vision = self.vision_model
    side = pixel_values.shape[-1] // vision.patch_size
    whole = torch.ones(
        pixel_values.shape[0], side, side, dtype=torch.bool, device=pixel_values.device
    )
    hidden = vision.embeddings(pixel_values.to(self.dtype), whole)
    hidden = vision.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
    features = self.connector(vision.post_layernorm(hidden))
    return BaseModelOutputWithPooling(pooler_output=features)


def _llava_features(self: Any, pixel_values: Tensor, **_: Any) -> Any:
    """Without a list of the features of each image: how many there are is free."""
    outputs = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
    layers = self.config.vision_feature_layer
    chosen = [outputs.hidden_states[i] for i in ([layers] if isinstance(layers, int) else layers)]
    if self.config.vision_feature_select_strategy == "default":
        chosen = [hidden[:, 1:] for hidden in chosen]
    features = self.multi_modal_projector(torch.cat(chosen, dim=-1))
    parts: Any = [features.flatten(0, 1)]
    return BaseModelOutputWithPooling(pooler_output=parts)


# Methods, by class and name.
IMAGE_METHODS: dict[tuple[str, str], Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    ("Idefics3Model", "get_image_features"): lambda _: _idefics3_features,
    ("SmolVLMModel", "get_image_features"): lambda _: _idefics3_features,
    ("LlavaModel", "get_image_features"): lambda _: _llava_features,
}
