"""Programs as files: one safetensors file, with the graph as JSON in its header.

Nothing in a file is code: operators are named, and only those of `torch.ops` and a few of Python's
are looked up. Shapes are not stored but propagated anew.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy
from transformers import AutoConfig, PretrainedConfig

import graphtune.gradients  # noqa: F401  (its operators are looked up by name)
import graphtune.models.kernels  # noqa: F401  (as are its)
import graphtune.noise  # noqa: F401  (as are its)
from graphtune.errors import UserError
from graphtune.program import Deferred, LedgerRow, ModelInfo, Program
from graphtune.quantization import FORMATS, Format
from graphtune.shapes import Shapes, fixed_batch
from graphtune.torchao_operators import torchao

_KEY = "graphtune"
_VERSION = 1
_PYTHON: dict[str, Callable[..., Any]] = {
    f"python.{function.__name__}": function
    for function in (
        getattr,
        operator.getitem,
        operator.mul,
        operator.add,
        operator.sub,
        operator.floordiv,
        operator.neg,
        operator.eq,
        operator.ge,
        operator.le,
        operator.gt,
        operator.lt,
    )
}
_NAMES = {function: name for name, function in _PYTHON.items()}


def save_program(program: Program, path: str | Path) -> Path:
    """Write a program: its graph, its ledger, and its tensors where it has them.

    Args:
        path: of the file; what lies there is replaced when the new file is whole.

    Raises:
        UserError: passes were applied to a program without weights, whose work is still to do; or
            the graph has what cannot be written.
    """
    if program.deferred is not None and program.deferred.fills:
        raise UserError("save: the program has no weights yet; call load_weights first")
    if program.distribution is not None:
        raise UserError("save: the program is spread over several processes; save checkpoints")
    path = Path(path)
    tensors, aliases = _tensors(program)
    description = {
        "version": _VERSION,
        "graph": [_write_node(node) for node in program.graph.nodes],
        "ledger": [dataclasses.asdict(row) for row in program.ledger],
        "info": _write_info(program.info),
        "training": program.training,
        "tensors": aliases,
    }
    metadata = {"format": "pt", _KEY: json.dumps(description)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata=metadata)
    temporary.replace(path)
    return path


def load_program(path: str | Path, *, device: torch.device | str | None = None) -> Program:
    """Read a program that `save_program` wrote.

    Args:
        device: where its tensors go; None is torch's default device. A program that was saved
            without weights is on the meta device.

    Raises:
        UserError: no such file, or it is not a program of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"Program.load: {path} does not exist")
    device = torch.get_default_device() if device is None else torch.device(device)
    with safe_open(path, "pt", device=str(device)) as file:
        text = (file.metadata() or {}).get(_KEY)
        if text is None:
            raise UserError(f"Program.load: {path} is no program; Program.save writes one")
        description = json.loads(text)
        if description["version"] != _VERSION:
            raise UserError(f"Program.load: {path} was written by another version of graphtune")
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parameters, buffers = _read_tensors(description["tensors"], stored)
    tensors = parameters | {name: buffer for name, (buffer, _) in buffers.items()}
    ledger = [LedgerRow(**{**row, "sites": tuple(row["sites"])}) for row in description["ledger"]]
    graph = _read_graph(description["graph"], tensors, fixed_batch(ledger))
    empty = any(parameter.is_meta for parameter in parameters.values())
    saved = {name: buffer for name, (buffer, is_saved) in buffers.items() if is_saved}
    program = Program(
        graph,
        parameters,
        buffers,
        _read_info(description["info"]),
        ledger,
        Deferred(parameters | saved) if empty else None,
    )
    return program.train(description["training"])


def _tensors(program: Program) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What goes into the file, tied tensors once, and what is said of each name."""
    first: dict[int, str] = {}
    stored, described = {}, {}
    everything: dict[str, tuple[Tensor, bool]] = {**program.all_buffers()}
    everything |= {name: (p, True) for name, p in program.all_parameters().items()}
    for name, (tensor, saved) in everything.items():
        owner = first.setdefault(id(tensor), name)
        if owner == name and not tensor.is_meta:
            stored[name] = tensor.detach().clone().contiguous()
        described[name] = {
            "of": owner,
            "parameter": isinstance(tensor, nn.Parameter),
            "trainable": tensor.requires_grad,
            "saved": saved,
            "shape": list(tensor.shape),
            "dtype": _write(tensor.dtype),
        }
    return stored, described


def _read_tensors(
    described: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> tuple[dict[str, nn.Parameter], dict[str, tuple[Tensor, bool]]]:
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, tuple[Tensor, bool]] = {}
    made: dict[str, Tensor] = {}
    for name, says in described.items():
        if says["of"] not in made:
            value = stored.get(says["of"])
            if value is None:
                value = torch.empty(says["shape"], dtype=_read(says["dtype"], {}), device="meta")
            is_parameter = says["parameter"]
            made[says["of"]] = nn.Parameter(value, says["trainable"]) if is_parameter else value
        tensor = made[says["of"]]
        if isinstance(tensor, nn.Parameter):
            parameters[name] = tensor
        else:
            buffers[name] = (tensor, says["saved"])
    return parameters, buffers


def _write_info(info: ModelInfo) -> dict[str, Any]:
    config = None
    if isinstance(info.config, PretrainedConfig):
        config = json.loads(info.config.to_json_string(use_diff=False))
        config["_attn_implementation"] = getattr(info.config, "_attn_implementation", None)
    return {**{f.name: getattr(info, f.name) for f in dataclasses.fields(info)}, "config": config}


def _read_info(written: Mapping[str, Any]) -> ModelInfo:
    config = written["config"]
    if config is not None:
        kind = config.pop("model_type")
        attention = config.pop("_attn_implementation")
        config = AutoConfig.for_model(kind, **config)
        config._attn_implementation = attention
    return ModelInfo(**{**written, "config": config})


# Nodes. What `meta` keeps is what passes and views read.


def _write_node(node: fx.Node) -> dict[str, Any]:
    written = {
        "op": node.op,
        "name": node.name,
        "target": _write_target(node) if node.op == "call_function" else node.target,
        "args": _write(node.args),
        "kwargs": _write(dict(node.kwargs)),
        "stack": {key: list(value) for key, value in node.meta.get("nn_module_stack", {}).items()},
        "trace": node.meta.get("stack_trace"),
        "custom": _write(node.meta.get("custom", {})),
    }
    if node.op == "placeholder":
        value = node.meta["val"]
        written["shape"] = [size if isinstance(size, int) else None for size in value.shape]
        written["dtype"] = _write(value.dtype)
    if "recompute" in node.meta:
        written["recompute"] = [node.meta["recompute"].name, node.meta["ac_graph_id"]]
    return written


def _write_target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    if node.target in _NAMES:
        return _NAMES[node.target]
    raise UserError(f"save: node {node.name} calls {node.target}, which cannot be written")


def _read_target(name: str) -> Any:
    if name in _PYTHON:
        return _PYTHON[name]
    namespace, packet, overload = name.split(".")
    if namespace == "transformers":  # its operators exist once this is imported
        import transformers.integrations.moe  # noqa: F401
    if namespace in ("torchao", "quantized_decomposed"):
        torchao()
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _read_graph(
    written: list[dict[str, Any]], tensors: Mapping[str, Tensor], batch: int | None
) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    shapes = Shapes(tensors, batch)
    for says in written:
        args, kwargs = _read(says["args"], nodes), _read(says["kwargs"], nodes)
        target = _read_target(says["target"]) if says["op"] == "call_function" else says["target"]
        node = graph.create_node(says["op"], target, args, kwargs, name=says["name"])
        nodes[says["name"]] = node
        node.meta["nn_module_stack"] = {key: tuple(value) for key, value in says["stack"].items()}
        node.meta["custom"] = _read(says["custom"], nodes)
        if says["trace"]:
            node.meta["stack_trace"] = says["trace"]
        if "recompute" in says:
            node.meta["recompute"] = CheckpointPolicy[says["recompute"][0]]
            node.meta["ac_graph_id"] = says["recompute"][1]
        if node.op == "placeholder":
            dtype = _read(says["dtype"], nodes)
            node.meta["val"] = shapes.of_input(str(node.target), says["shape"], dtype)
        elif node.op != "output":
            node.meta["val"] = shapes.of(node)
    return graph


_TYPES: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def _write(value: Any) -> Any:
    """A node's argument as JSON; what JSON has not is a mapping with one key that starts with $."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"$float": value.hex()}  # infinities too
    if isinstance(value, fx.Node):
        return {"$node": value.name}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if isinstance(value, Format):
        return {"$format": [value.name, vars(value)]}
    for key, kind in _TYPES.items():
        if isinstance(value, kind):
            return {f"${key}": str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"$slice": [_write(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"$tuple": [_write(item) for item in value]}
    if isinstance(value, list):
        return [_write(item) for item in value]
    if isinstance(value, Mapping):
        return {"$dict": {str(key): _write(item) for key, item in value.items()}}
    raise UserError(f"save: a value of type {type(value).__name__} cannot be written: {value!r}")


def _read(written: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(written, list):
        return [_read(item, nodes) for item in written]
    if not isinstance(written, dict):
        return written
    ((key, value),) = written.items()
    key = key.removeprefix("$")
    if key in _TYPES:
        found = getattr(torch, value)
        assert isinstance(found, _TYPES[key])
        return found
    readers: dict[str, Callable[[], Any]] = {
        "float": lambda: float.fromhex(value),
        "node": lambda: nodes[value],
        "device": lambda: torch.device(value),
        "format": lambda: FORMATS[value[0]](**value[1]),
        "slice": lambda: slice(*(_read(part, nodes) for part in value)),
        "tuple": lambda: tuple(_read(item, nodes) for item in value),
        "dict": lambda: {name: _read(item, nodes) for name, item in value.items()},
    }
    return readers[key]()
