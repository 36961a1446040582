"""From what a config says of data to data sets, with the images of conversations if it has some."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import islice
from typing import Any, TypeVar

from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from graphtune.config import Component, SFTConfig
from graphtune.data import Dataset, StreamingDataset, mix
from graphtune.data.fields import ImagesFound
from graphtune.errors import UserError
from graphtune.models import load_processor
from graphtune.models.images import image_model
from graphtune.recipes import origin

Data = Dataset | StreamingDataset
T = TypeVar("T")
Reader = PreTrainedTokenizerBase | ProcessorMixin


def read_sets(
    cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig
) -> tuple[SFTConfig, tuple[Data, Data | None, Data | None]]:
    """What a config trains on, what it measures the loss on, and unrelated text.

    Images are found as text is read: where there is none, the model is one for text.

    Args:
        cfg: its `model.images` may be null.
        tokenizer: the model's.
        model: the configuration of the model.

    Returns:
        The config with what `model.images` turned out to be, and the data sets.

    Raises:
        UserError: data that cannot be read; images that the model does not take, or that the
            config does not want.
    """

    def read(reader: Reader) -> tuple[Data, Data | None, Data | None]:
        others = (
            None if source is None else read_data(source, reader, cfg)
            for source in (cfg.dataset_val, cfg.retention)
        )
        return read_data(cfg.dataset, reader, cfg), *others  # type: ignore[return-value]

    images, sets = _with_tokenizer_or_processor(cfg, tokenizer, model, read)
    model_config = dataclasses.replace(cfg.model, images=images)
    return dataclasses.replace(cfg, model=model_config), sets


def first_examples(
    cfg: SFTConfig, tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig, count: int
) -> tuple[bool, list[tuple[str, list[Any]]]]:
    """Whether there are images, and the first examples of each data set that a config names, by
    its key; arguments and errors as those of `read_sets`."""
    sources = {name: getattr(cfg, name) for name in ("dataset", "dataset_val", "retention")}
    parts = [
        _beginning(part.without("weight") if isinstance(value, list) else part, count)
        for value in sources.values()
        for part in (value if isinstance(value, list) else [value] if value else [])
    ]

    def read(reader: Reader) -> list[tuple[str, list[Any]]]:
        return [(p.key, list(islice(iter(read_data(p, reader, cfg)), count))) for p in parts]

    return _with_tokenizer_or_processor(cfg, tokenizer, model, read)


def _with_tokenizer_or_processor(
    cfg: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PretrainedConfig,
    read: Callable[[Reader], T],
) -> tuple[bool, T]:
    """What is read with the tokenizer; where that finds an image, or by the config's wish, with
    the processor. And whether it was."""
    if not cfg.model.images:
        try:
            return False, read(tokenizer)
        except UserError as error:
            if cfg.model.images is False or not _is_about_images(error):
                raise
            try:
                image_model(model)
            except UserError as refused:
                raise UserError(f"{error}; but {refused}") from error
    return True, read(processor_of(cfg, model))


def _is_about_images(error: BaseException | None) -> bool:
    """Whether an image was found, and those who heard of it said where."""
    return error is not None and (
        isinstance(error, ImagesFound) or _is_about_images(error.__cause__)
    )


def processor_of(cfg: SFTConfig, model: PretrainedConfig) -> ProcessorMixin:
    """The processor of a config's model.

    Raises:
        UserError: the model does not take images, or has no processor.
    """
    image_model(model)
    processor = load_processor(cfg.model.id, **origin(cfg.model))
    if not isinstance(processor, ProcessorMixin):
        raise UserError(
            f"`model.id={cfg.model.id}` has no processor (processor_config.json), which reads "
            "images; add the one that the model was published with"
        )
    return processor


def _beginning(source: Component, count: int) -> Component:
    """The same data set, so that not all of it is read for a few examples, where it can be."""
    if source.takes("limit"):
        return source.having(limit=count)
    if source.takes("streaming") and "%" not in str(source.arguments.get("split", "")):
        return source.having(streaming=True)
    return source


def _fitting(source: Component, reader: Reader) -> Reader:
    """A processor for what can hold images, the tokenizer for the rest."""
    if isinstance(reader, ProcessorMixin) and not source.takes("image_dir"):
        tokenizer: PreTrainedTokenizerBase = reader.tokenizer
        return tokenizer
    return reader


def read_data(
    source: Component | list[Component],
    reader: Reader,
    cfg: SFTConfig,
) -> Data:
    """A config's data set; several are mixed by their weights, or laid end to end without.

    Args:
        source: the config's `dataset`, or another of its data sets.
        reader: the model's tokenizer; or, so that conversations may hold images, its processor,
            which data sets get that have an option `image_dir`.
        cfg: the config.
    """
    if isinstance(source, Component):
        if "max_length" in source.arguments:
            raise UserError(
                f"`{source.key}.max_length`: examples are cut to `loader.length` "
                f"({cfg.loader.length} tokens), what a row holds; set that, and leave this out"
            )
        data: Data = source.build(_fitting(source, reader), max_length=cfg.loader.length)
        if not isinstance(data, StreamingDataset) and not data:
            raise UserError(f"`{source.key}` has no examples; check its source, split and filters")
        return data
    weights = [one.arguments.get("weight") for one in source]
    given = [weight is not None for weight in weights]
    if any(given) and not all(given):
        place = f"{source[given.index(False)].key}.weight"
        raise UserError(f"`{place}`: give each data set a weight, or none of them")
    parts = [read_data(one.without("weight"), reader, cfg) for one in source]
    return mix(parts, weights if all(given) else None, seed=cfg.seed)  # type: ignore[arg-type]
