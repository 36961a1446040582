"""Adapters in PEFT's layout, out and in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphtune.errors import UserError
from graphtune.export.artifact import Artifact, artifact, logits, probe_ids
from graphtune.passes.adapters import SetAdapter, adapter_names, adapter_of, adapter_pass, strip
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.passes.dora import DoRA
from graphtune.passes.lora import LoRA, initial
from graphtune.program import Program
from graphtune.rewrite import Edit
from graphtune.sites import Site, find_sites

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."  # PEFT wraps the model twice, and its keys say so
_FINGERPRINT = "base_model_fingerprint"  # in the metadata of the weights' file
_SOURCE = "base_model_name_or_path"


def to_peft(
    program: Program,
    out_dir: str | Path,
    *,
    adapter: str | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    run: str | None = None,
) -> Path:
    """Write an adapter as PEFT does, so that PEFT, vLLM and others load it.

    An adapter that PiSSA started is written as the plain LoRA of twice the rank that has the same
    effect on the original base model.

    Args:
        program: with an adapter that is not merged.
        out_dir: must be missing or empty; gets `adapter_model.safetensors`,
            `adapter_config.json` and `manifest.json`.
        adapter: which one; may be left out where there is only one.
        tolerance: largest difference of a logit between the adapter and what is read back, where
            logits reach 10 or less; None: 1e-4 for a float32 program.
        overwrite, run: see `graphtune.export.artifact.artifact`.

    Returns:
        The folder.

    Raises:
        UserError: the program has no such adapter, or `out_dir` holds something.
        RuntimeError: what is read back gives other logits.
    """
    adapter = _which(program, adapter)
    with artifact(out_dir, "peft", program, overwrite=overwrite, run=run) as made:
        write_peft(program, made.path, adapter=adapter)
        _check_read_back(made, program, adapter, tolerance)
    return Path(out_dir)


def _check_read_back(
    made: Artifact, program: Program, adapter: str, tolerance: float | None
) -> None:
    """Compare with the adapter that the folder has, on the same base."""
    if program.deferred is not None:
        raise UserError("export.peft: the program has no weights yet; call load_weights first")
    factors = [f for n in program.all_buffers() if (f := adapter_of(n)) is not None]
    if adapter in factors:  # what PiSSA took out of the base is in no base that is here
        made.facts["not_run"] = "the adapter starts by PiSSA: its base is not the program's own"
        return
    again = from_peft(program.apply(_Base()), made.path, adapter=adapter, check_base=False)
    ids = probe_ids(program)
    expected = logits(program.apply(SetAdapter((adapter,))), ids)
    made.check("the adapter, read back", logits(again, ids), expected, tolerance)


@dataclass(frozen=True)
class _Base(Pass):
    """Takes all adapters out, for good."""

    name: ClassVar[str] = "base"
    stage: ClassVar[Stage] = Stage.EXPORT
    numerics: ClassVar[Numerics] = "lossy"

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        sites = strip(edit)
        for name in [n for n in (*edit.parameters, *edit.buffers) if adapter_of(n) is not None]:
            edit.remove(name)
        return sites


def write_peft(program: Program, folder: Path, *, adapter: str | None = None) -> None:
    """The files of `to_peft`, into a folder that is made if missing; each appears whole."""
    adapter = _which(program, adapter)
    one = adapter_pass(program, adapter)
    sites = {site.name: (site, own) for site, own in one.adapted_sites(program.graph)}
    tensors = {
        _PREFIX + key: program.get_parameter(name).detach().cpu().contiguous()
        for name, key in _keys(program, adapter).items()
    }
    doubled = _without_start(program, sites, tensors)
    metadata = {"format": "pt"}
    if program.info.fingerprint is not None:
        metadata[_FINGERPRINT] = program.info.fingerprint
    saved = re.compile(rf"(.*)\.modules_to_save\.{adapter}\.\w+")
    modules = dict.fromkeys(m[1] for n in program.all_parameters() if (m := saved.fullmatch(n)))
    config = _peft_config(one, sites, doubled, list(modules)) | {_SOURCE: program.source}
    folder.mkdir(parents=True, exist_ok=True)
    # Each file appears whole or not at all, the weights last: a folder with weights is complete.
    _replace(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata=metadata))


def from_peft(
    program: Program,
    adapter_dir: str | Path,
    *,
    adapter: str = "default",
    check_base: bool = True,
) -> Program:
    """Apply the adapter that lies in a folder in PEFT's layout.

    Args:
        program: the base model, perhaps with other adapters or quantized.
        adapter_dir: has `adapter_model.safetensors` and `adapter_config.json`.
        adapter: the name that it gets.
        check_base: refuse an adapter whose record of its base model is another one.

    Raises:
        UserError: a file is missing, the adapter uses what `LoRA` and `DoRA` have not, or it is
            for another base model.
    """
    if program.deferred is not None:
        raise UserError("adapter: the program has no weights yet; call load_weights first")
    folder = Path(adapter_dir)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"adapter: {folder} has no {name}; give a folder in PEFT's layout")
    config = json.loads((folder / CONFIG).read_text())
    if check_base:
        _check_base(program, folder, config)
    saved = {k.removeprefix(_PREFIX): v for k, v in load_file(folder / WEIGHTS).items()}
    # PEFT writes the unchanged table beside the adapter of an embedding.
    saved = {k: v for k, v in saved.items() if not k.endswith(".base_layer.weight")}
    tuned = program.apply(_adapter_pass(program, config, saved, adapter))
    keys = _keys(tuned, adapter)
    for key in sorted(set(keys.values()) ^ saved.keys()):
        where = "has no tensor" if key in keys.values() else "has a tensor that the model has not:"
        raise UserError(f"adapter: {folder / WEIGHTS} {where} {key}")
    with torch.no_grad():
        for name, key in keys.items():
            parameter = tuned.get_parameter(name)
            if parameter.shape != saved[key].shape:
                raise UserError(
                    f"adapter: {key} has shape {tuple(saved[key].shape)}, the model needs "
                    f"{tuple(parameter.shape)}; was it trained on another base?"
                )
            parameter.copy_(saved[key])
    return tuned


def _which(program: Program, adapter: str | None) -> str:
    names = adapter_names(program)
    if not names:
        raise UserError("export.peft: the program has no adapter; apply LoRA, and do not merge it")
    if adapter is None and len(names) == 1:
        return names[0]
    if adapter not in names:
        raise UserError(f"export.peft: adapter {adapter!r} is none of {', '.join(names)}")
    return adapter


def _keys(program: Program, adapter: str) -> dict[str, str]:
    """PEFT's keys of all that belongs to an adapter, by our names."""
    one = adapter_pass(program, adapter)
    sites = {site.name: (site, own) for site, own in one.adapted_sites(program.graph)}
    experts = _experts(program, sites.__contains__)
    keys: dict[str, str] = {}
    for site, own in sites.values():
        prefix = _prefix(experts, site)
        for factor in own.factors(site):
            leaf = re.search(r"lora_(?:embedding_)?(?:A|B|magnitude_vector)", factor)
            assert leaf is not None
            suffix = ".weight" if leaf[0] in ("lora_A", "lora_B") else ""
            keys[factor] = f"{prefix}.{leaf[0]}{suffix}"
    for name, parameter in program.all_parameters().items():
        module, _, leaf_name = name.rpartition(".")
        if ".modules_to_save." in name and adapter_of(name) == adapter:
            keys[name] = f"{module.partition('.modules_to_save.')[0]}.{leaf_name}"
        elif leaf_name == "bias" and parameter.requires_grad and one.bias != "none":
            keys[name] = f"{module}.base_layer.bias" if module in sites else name
    return keys


def _prefix(experts: Mapping[str, list[Site]], site: Site) -> str:
    """Where PEFT keeps a site's adapter.

    Of several adapted parameters of one module, each wraps the one before it.
    """
    if site.kind != "experts":
        return site.name
    module = site.name.rpartition(".")[0]
    names = [one.name for one in experts[module]]
    return module + ".base_layer" * (len(names) - 1 - names.index(site.name))


def _experts(program: Program, adapted: Callable[[str], bool]) -> dict[str, list[Site]]:
    """The adapted experts of each module, in the order in which the module defines them."""
    found = {site.name: site for site in find_sites(program.graph) if site.kind == "experts"}
    names = list(program.all_parameters()) + list(program.all_buffers())
    order = {name: position for position, name in enumerate(reversed(names))}
    by_module: dict[str, list[Site]] = {}
    for name in sorted(filter(adapted, found), key=lambda n: -order.get(n, 0)):
        by_module.setdefault(name.rpartition(".")[0], []).append(found[name])
    return by_module


def _without_start(
    program: Program,
    sites: Mapping[str, tuple[Site, LoRA]],
    tensors: dict[str, Tensor],
) -> set[str]:
    """Turn what PiSSA learned into an update of the original weight, `B A - B0 A0`.

    Returns:
        The sites whose rank has doubled.
    """
    buffers = program.all_buffers()
    doubled = set()
    for name, (site, own) in sites.items():
        a, b = own.factors(site)[:2]
        if initial(a) in buffers:
            a0, b0 = (buffers[initial(n)][0].cpu() for n in (a, b))
            key = f"{_PREFIX}{name}.lora_"
            tensors[f"{key}A.weight"] = torch.cat([tensors[f"{key}A.weight"], a0])
            tensors[f"{key}B.weight"] = torch.cat([tensors[f"{key}B.weight"], -b0], dim=1)
            doubled.add(name)
    return doubled


def _peft_config(
    one: LoRA,
    sites: Mapping[str, tuple[Site, LoRA]],
    doubled: set[str],
    modules: list[str],
) -> dict[str, Any]:
    ranks = {name: own.rank * (2 if name in doubled else 1) for name, (_, own) in sites.items()}
    alphas = {
        name: own.scaling * (math.sqrt(ranks[name]) if one.rslora else ranks[name])
        for name, (_, own) in sites.items()
    }
    rank, alpha = (max(d.values(), key=list(d.values()).count) for d in (ranks, alphas))
    kinds = {name: site.kind for name, (site, _) in sites.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": one.dropout if "experts" not in kinds.values() else 0.0,
        "use_rslora": one.rslora,
        "use_dora": isinstance(one, DoRA),
        "init_lora_weights": True,
        "target_modules": [name for name, kind in kinds.items() if kind != "experts"],
        "target_parameters": [n for n, kind in kinds.items() if kind == "experts"] or None,
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(n): a for n, a in alphas.items() if a != alpha},
        "fan_in_fan_out": any(s.kind == "linear" and s.transposed for s, _ in sites.values()),
        "bias": one.bias,
        "modules_to_save": modules or None,
        "inference_mode": True,
    }


# Options of PEFT that change what an adapter computes, with the value that LoRA stands for.
_UNSUPPORTED = {"lora_bias": False, "trainable_token_indices": None, "layer_replication": None}


def _adapter_pass(
    program: Program, config: dict[str, Any], saved: Mapping[str, Tensor], adapter: str
) -> LoRA:
    """The pass that makes the parameters that a folder has tensors for."""
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"adapter: peft_type {config.get('peft_type')!r} is not supported; only LORA"
        )
    for key, plain in _UNSUPPORTED.items():
        if config.get(key) not in (plain, None):
            raise UserError(f"adapter: {key}={config[key]!r} is not supported")
    rslora = config.get("use_rslora", False)
    groups: dict[tuple[int, float], list[str]] = {}
    parameters = config.get("target_parameters") or []
    for name, rank in _saved_sites(program, saved, parameters).items():
        pattern = _pattern_of(name, config.get("alpha_pattern") or {})
        alpha = config["alpha_pattern"][pattern] if pattern else config["lora_alpha"]
        groups.setdefault((rank, alpha), []).append(name)
    kind = DoRA if config.get("use_dora") else LoRA
    return kind(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        rslora=rslora,
        targets=tuple(
            {"sites": names, "rank": rank, "alpha": alpha}
            for (rank, alpha), names in groups.items()
        ),
        bias=config.get("bias", "none"),
        modules_to_save=_saved_modules(saved),
        adapter=adapter,
    )


def _saved_sites(
    program: Program, saved: Mapping[str, Tensor], target_parameters: list[str]
) -> dict[str, int]:
    """The sites that have tensors in a folder, with their rank."""
    experts = _experts(
        program, lambda name: any(f".{name}".endswith(f".{t}") for t in target_parameters)
    )
    ranks = {}
    for key, tensor in saved.items():
        if not (
            found := re.fullmatch(
                r"(.*?)((?:\.base_layer)*)\.lora_(?:embedding_)?A(\.weight)?", key
            )
        ):
            continue
        module, outer = found[1], found[2].count(".base_layer")
        if outer < len(own := experts.get(module, [])):
            site = own[-1 - outer]
            ranks[site.name] = tensor.shape[0] // site.shape[0]
        else:
            ranks[module] = tensor.shape[0]
    return ranks


def _saved_modules(saved: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Modules that were trained in full: they have a weight without any `lora_` in its key."""
    whole = [key for key in saved if ".lora_" not in key and key.endswith(".weight")]
    return tuple(dict.fromkeys(key.removesuffix(".weight") for key in whole))


def _pattern_of(name: str, patterns: Mapping[str, Any]) -> str | None:
    """PEFT's patterns match a whole name or its end."""
    return next((p for p in patterns if re.fullmatch(rf"(?:.*\.)?(?:{p})", name)), None)


def _check_base(program: Program, folder: Path, config: Mapping[str, Any]) -> None:
    with safe_open(folder / WEIGHTS, "pt") as file:
        recorded = (file.metadata() or {}).get(_FINGERPRINT)
    own = program.info.fingerprint
    if recorded is not None and own is not None and recorded != own:
        raise UserError(
            f"adapter: {folder} was trained on {config.get(_SOURCE)} (fingerprint {recorded}), "
            f"and this is {program.source} (fingerprint {own}); load that base model, or give "
            "check_base=False to use the adapter here all the same"
        )


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.replace(path)
