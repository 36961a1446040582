"""Recipes: one file for each objective. Below, what they share: from a config to a Program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from graphtune.capture import capture
from graphtune.config import (
    ModelConfig,
    SFTConfig,
    check_options,
    component,
    did_you_mean,
    validate,
)
from graphtune.config import load_config as read_config
from graphtune.distributed import is_main, is_spread, sums_gradients
from graphtune.errors import UserError
from graphtune.export.hf import plan_files, to_hf
from graphtune.export.peft import CONFIG, from_peft, write_peft
from graphtune.models import load_config as load_model_config
from graphtune.models import load_model, load_tokenizer, resolve_dtype
from graphtune.models.families import published_config
from graphtune.passes import DataParallel, Pass, Stage, registry
from graphtune.passes.adapters import adapter_names, adapter_of
from graphtune.passes.qat import QAT, ranges
from graphtune.program import Program
from graphtune.training.device import pick_device
from graphtune.training.run import Run
from graphtune.weights import load_weights


def make_passes(options: Mapping[str, Mapping[str, Any] | None]) -> list[Pass]:
    """The passes that a config's `passes` names.

    Args:
        options: name of a pass, or dotted path of a class, to its options.

    Returns:
        The passes. In one process those that divide a program over ranks are left out, as there is
        nothing to divide. In several, ranks that take other batches need `fsdp` or
        `data_parallel`; where neither is named it is the latter, as users of torchrun expect.

    Raises:
        UserError: no such pass or option, or a value that it refuses.
    """
    made = []
    for name, values in options.items():
        key = f"passes.{name}"
        kind: Any = registry.get(name) or ("." in name and component(name, key))
        if not kind:
            raise UserError(f"`{key}`: there is no pass {name!r}{did_you_mean(name, registry)}")
        made.append(check_options(kind, values or {}, key))
    if not is_spread():
        return [one for one in made if one.stage != Stage.DISTRIBUTE]
    if not {"fsdp", "data_parallel"} & {one.name for one in made} and sums_gradients():
        made.append(DataParallel())
    return made


def origin(model: ModelConfig) -> dict[str, Any]:
    """What besides its id says which checkpoint a model comes from."""
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def empty_model(
    model: ModelConfig, device: torch.device, config: PretrainedConfig | None = None
) -> Any:
    """The model without weights, in the dtype that it will have on a device.

    Args:
        model: which, and how it is loaded.
        device: where its weights will be.
        config: the model's own, where it is known already; see `config_to_look_at`.
    """
    dtype = resolve_dtype(model.dtype, device)
    return load_model(
        model.id,
        dtype=dtype,
        device="meta",
        implementation=model.implementation,
        attn_implementation=model.attn_implementation,
        config=config,
        **origin(model),
    )


def config_to_look_at(model: ModelConfig) -> tuple[PretrainedConfig, str]:
    """The config of a model whose weights will not be loaded, and a note on where it is from.

    The shapes of a published model are known without the hub, which may be out of reach or ask
    for an account. They are enough to look at a graph, and never for training.

    Raises:
        UserError: there is no such model, and it is not among those that are known.
    """
    try:
        return load_model_config(model.id, **origin(model)), ""
    except UserError:
        config = published_config(model.id)
        if config is None:
            raise
        note = "its config cannot be read here (no hub, or no access): the published shapes instead"
        return config, f"{model.id}: {note}"


def check_length(cfg: SFTConfig, config: PretrainedConfig) -> None:
    """Raise UserError if a row of the config's is longer than its model's positions."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and cfg.loader.length > positions:
        raise UserError(
            f"`loader.length={cfg.loader.length}` is more than the {positions} positions of "
            f"{cfg.model.id}; choose at most {positions}"
        )


# Passes for the time of training: what was trained is the same without them.
_LEAVE_NOTHING = {"neftune", "activation_checkpoint", "qat"}


def save_trained(
    program: Program, tokenizer: PreTrainedTokenizerBase, run: Run, whole: Program | None = None
) -> None:
    """Save what trained: adapters in PEFT's layout, or a whole model in Hugging Face's.

    Args:
        program: with what trained. Of one that is spread over ranks, all ranks must call.
        tokenizer: saved beside a whole model.
        run: where to.
        whole: of a program that is spread over ranks, it without weights, before it was.

    Where neither can hold it (adapters beside weights that train in full, parameters of a pass
    that only graphtune knows), the trained parameters by name, as safetensors.
    """
    saved = program if whole is None else whole
    kinds = {row.name for row in saved.ledger} - _LEAVE_NOTHING
    if ranges(saved):
        kinds.add("qat")
    is_model = kinds <= {"full", "freeze"}
    if whole is not None and is_model:
        _save_divided_model(program, whole, tokenizer, run)
        return
    if whole is not None:
        put_together(whole, program)
        if not run.writes:
            return
    trained = {name: p for name, p in saved.named_parameters() if p.requires_grad}
    adapters = adapter_names(saved)
    if adapters and kinds <= {"quantize", "lora", "dora", "set_adapter", "freeze"}:
        for name in adapters:
            folder = run.adapter_dir if len(adapters) == 1 else run.adapter_dir / name
            write_peft(saved, folder, adapter=name)
    elif is_model:
        to_hf(saved, run.model_dir, tokenizer=tokenizer, verify=False, overwrite=True)
    else:
        tensors = {n: p.detach().cpu().contiguous() for n, p in (trained | ranges(saved)).items()}
        temporary = run.trained_file.with_name(f".{run.trained_file.name}.tmp")
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(run.trained_file)


@torch.no_grad()
def _save_divided_model(
    program: Program, whole: Program, tokenizer: PreTrainedTokenizerBase, run: Run
) -> None:
    """Rank 0 writes file after file; none has more of the model in memory than one file's."""
    distribution, found, like = program.distribution, program.state_dict(), whole.state_dict()
    assert distribution is not None

    def gathered(name: str) -> torch.Tensor:
        value = distribution.whole(name, found[name]).to(like[name].dtype)
        return value.cpu() if run.writes else value.new_empty(0)

    whole.info = program.info
    if run.writes:
        folder = run.model_dir
        to_hf(whole, folder, tokenizer=tokenizer, verify=False, overwrite=True, fetch=gathered)
        return
    for names in plan_files(like).filename_to_tensors.values():
        for name in names:
            gathered(name)


@torch.no_grad()
def put_together(whole: Program, program: Program) -> None:
    """Give a program without weights those of one that is spread over ranks; all ranks must call.

    On rank 0, on the CPU, one after the other; what the others gather they let go of at once. Of
    adapters the base stays away, as nothing that is saved holds it.
    """
    distribution = program.distribution
    assert distribution is not None
    adapters = bool(adapter_names(program))
    places = whole.all_parameters() | {n: b for n, (b, _) in whole.all_buffers().items()}
    found = program.all_parameters() | {n: b for n, (b, _) in program.all_buffers().items()}
    done: dict[int, torch.Tensor] = {}  # tied ones are one
    for name, place in places.items():
        value = found[name]
        if distribution.parts.get(name) and id(place) not in done:
            if adapters and not value.requires_grad and adapter_of(name) is None:
                continue
            value = distribution.whole(name, value).to(place.dtype)
            value = value.cpu() if is_main() else value.new_empty(0)
            if isinstance(place, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=found[name].requires_grad)
        path, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(path), leaf, done.setdefault(id(place), value))
    whole.info = program.info
    whole.deferred = None


def load_run(
    folder: str | Path,
    *,
    tuned: bool = True,
    quantized: bool = True,
    aware: bool = True,
    images: bool = True,
) -> tuple[Program, PreTrainedTokenizerBase]:
    """The program and the tokenizer of a run that `train` wrote.

    Args:
        folder: the run's output_dir.
        tuned: False gives the base model, as it was before training.
        quantized: False leaves out the quantization of a base that adapters were trained over,
            for what is merged and shipped.
        aware: False leaves out the fake quantization that the run was trained with; what is loaded
            is in full precision.
        images: False gives a program for text alone, also of a run that was trained on images.

    Raises:
        UserError: no run lies there, or it saved nothing.
    """
    run = Run.open(folder)
    config: SFTConfig = validate(read_config(str(run.config_file)))
    takes_images = images and config.model.images is True
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, images=takes_images)
    )
    tokenizer = load_tokenizer(config.model.id, **origin(config.model))
    device = pick_device(config.device)
    if tuned and run.program_file.is_file():
        return Program.load(run.program_file, device=device), tokenizer
    passes = [part for one in make_passes(config.passes) for part in one.parts()]
    qat = [part for part in passes if isinstance(part, QAT)] if tuned and aware else []
    if not quantized:
        passes = [one for one in passes if one.stage != Stage.QUANTIZE]
    program = _load(run, config, [one for one in passes if not isinstance(one, QAT)], tuned)
    begun = [dataclasses.replace(one, enabled_from_step=0) for one in qat if had_begun(run, one)]
    program = program.apply(*begun)
    if tuned and run.trained_file.is_file():
        _put(program, load_file(run.trained_file))
    return program, tokenizer


def had_begun(run: Run, qat: QAT) -> bool:
    """Whether a run trained as long as to have taken a step with fake quantization."""
    metrics = run.metrics()
    return bool(metrics) and metrics[-1]["step"] > qat.enabled_from_step


def check_begun(folder: str | Path) -> None:
    """Raise UserError if a run was to train with fake quantization, and ended before it began."""
    run = Run.open(folder)
    config: SFTConfig = validate(read_config(str(run.config_file)))
    for one in make_passes(config.passes):
        if isinstance(one, QAT) and not had_begun(run, one):
            raise UserError(
                f"{folder} ended before `passes.qat.enabled_from_step={one.enabled_from_step}`; "
                f"train on, or quantize it as it is: graphtune quantize {folder} --scheme ..."
            )


def _load(run: Run, config: SFTConfig, passes: list[Pass], tuned: bool) -> Program:
    """The program of a run before fake quantization."""
    device = pick_device(config.device)
    if tuned and run.model_dir.is_dir():
        model = load_model(
            run.model_dir,
            dtype=config.model.dtype,
            device=device,
            implementation=config.model.implementation,
            attn_implementation=config.model.attn_implementation,
        )
        return capture(model, images=bool(config.model.images))
    whole = tuned and run.trained_file.is_file()
    if not whole:  # what trained comes with what was saved
        passes = [one for one in passes if one.stage == Stage.QUANTIZE]
    empty = empty_model(config.model, device)
    program = capture(empty, images=bool(config.model.images)).apply(*passes)
    program = load_weights(program, device=device, **origin(config.model))
    if tuned and not whole:
        for path in _adapter_folders(run):
            adapter = "default" if path == run.adapter_dir else path.name
            program = from_peft(program, path, adapter=adapter)
    return program


def _adapter_folders(run: Run) -> list[Path]:
    if (run.adapter_dir / CONFIG).is_file():
        return [run.adapter_dir]
    found = sorted(path.parent for path in run.adapter_dir.glob(f"*/{CONFIG}"))
    if not found:
        raise UserError(f"{run.folder} has saved nothing; did the run fail before its first step?")
    return found


@torch.no_grad()
def _put(program: Program, tensors: Mapping[str, torch.Tensor]) -> None:
    own = program.all_parameters() | dict(program.named_buffers())
    for name, tensor in tensors.items():
        if name in own:  # else of a pass that was left out
            own[name].copy_(tensor)
