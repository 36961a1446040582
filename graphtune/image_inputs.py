"""The images of a batch, as the graph of a model that takes images wants them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphtune.errors import UserError
from graphtune.losses import Batch, with_rows
from graphtune.masks import with_documents
from graphtune.models.images import IMAGE_INPUTS, PIXELS, ImageModel, image_model

_MASK = "pixel_attention_mask"  # of processors that fill up images to one size
_FEWEST = 2  # images, as symbolic sizes have to be


def as_taken(program: Any, batch: Batch) -> Batch:
    """A batch with all that a program takes: images, labelled rows, documents or their mask.

    Not for what is compiled: what there is depends on the batch's values.

    Args:
        program: a `graphtune.Program`.
        batch: see `graphtune.engine.TrainStep`; images as the model itself takes them.

    Raises:
        UserError: images for a program that takes none, or that do not match the tokens.
    """
    return with_rows(program, with_documents(program, with_images(program, batch)))


def with_images(program: Any, batch: Batch) -> Batch:
    """A batch whose images lie end to end, for a program that was captured with images.

    Args:
        program: a `graphtune.Program`.
        batch: `pixel_values` float (images, channels, height, width) or, filled up with images
            that are none, (batch, images, channels, height, width), then perhaps with their
            `pixel_attention_mask`; `token_type_ids` int64 (batch, seq), 1 for an image's token.
            Without, all of it is text.

    Returns:
        The batch with `pixel_values` float32 (images, channels, height, width) and, where the
        graph takes them, `token_type_ids`; nothing else of images.
    """
    if not program.takes_images:
        if PIXELS in batch:
            raise UserError(
                "the batch holds images, which the program does not take; capture the model with "
                "images=True"
            )
        return {name: value for name, value in batch.items() if name not in IMAGE_INPUTS}
    model = image_model(program.config)
    blank = model.blank(batch["input_ids"])
    pixels = _end_to_end(batch, model) if PIXELS in batch else blank[PIXELS][:0]
    _check_tokens(batch["input_ids"], len(pixels), model)
    missing = max(0, _FEWEST - len(pixels))
    given = {PIXELS: F.pad(pixels, (0, 0) * 3 + (0, missing))}
    for name in model.inputs:
        if name != PIXELS:
            given[name] = batch.get(name, blank[name])
    others = {n: value for n, value in batch.items() if n not in (*IMAGE_INPUTS, _MASK)}
    return {**others, **given}


def _end_to_end(batch: Mapping[str, Tensor], model: ImageModel) -> Tensor:
    """The images of all rows, (images, channels, height, width), without those that are none."""
    pixels = batch[PIXELS].float()
    if tuple(pixels.shape[-3:]) != model.size:
        found, right = (" x ".join(map(str, s)) for s in (pixels.shape[-3:], model.size))
        raise UserError(
            f"model.id: its processor gives images of {found} (channels, height, width), and the "
            f"model takes {right}; correct the size in its preprocessor_config.json"
        )
    if pixels.dim() == 4:
        return pixels
    pixels = pixels.flatten(0, 1)
    mask = batch.get(_MASK)
    if mask is None:
        return pixels[(pixels != 0).flatten(1).any(1)]
    mask = mask.flatten(0, 1).flatten(1).bool()
    real = mask.any(1)
    if not bool(mask[real].all()):
        raise UserError(
            "model.id: its processor fills up images to one size, which cannot be captured yet; "
            "let it split or resize images (do_image_splitting, do_resize)"
        )
    return pixels[real]


def _check_tokens(input_ids: Tensor, images: int, model: ImageModel) -> None:
    tokens = int(torch.count_nonzero(input_ids == model.token_id))
    if tokens != images * model.tokens:
        raise UserError(
            f"dataset: a batch has {tokens} tokens that stand for images, and {images} images, "
            f"for which {images * model.tokens} would stand ({model.tokens} each); its text may "
            "hold the placeholder, or the processor is that of another model"
        )
