"""From an `nn.Module` to a Program: `torch.export`, then the clean-up that every pass needs."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphtune.errors import UserError
from graphtune.normalize import normalize
from graphtune.program import ModelInfo, Program
from graphtune.torch_private import size_symbol


def capture(model: nn.Module) -> Program:
    """Capture the forward of a causal language model as a Program.

    The model is traced once, without gradients being lost: non-strict `torch.export` in train
    mode, with dynamic batch and sequence, an explicit boolean attention mask and positions. The
    program shares the model's parameters.

    Args:
        model: forward takes `input_ids`, `attention_mask` and, optionally, `position_ids`, and
            returns logits or an output with `.logits`. Any `transformers` causal model is one.

    Raises:
        UserError: the model cannot be captured as it is; the message says why.
    """
    _check(model)
    windows = _windows(getattr(model, "config", None))
    exported = _export(model, windows)
    graph_module = exported.module(check_guards=False)
    graph = normalize(graph_module, exported.call_spec.out_spec, windows)
    _check_dynamic(graph)
    saved = graph_module.state_dict(keep_vars=True).keys()
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    buffers = {
        name: (buffer, name in saved)
        for name, buffer in graph_module.named_buffers(remove_duplicate=False)
    }
    info = ModelInfo(
        source=getattr(model, "graphtune_source", None),
        config=getattr(model, "config", None),
        model_class=type(model).__name__,
    )
    return Program(graph, parameters, buffers, info).train(model.training)


def _check(model: nn.Module) -> None:
    accepted = inspect.signature(model.forward).parameters
    missing = [name for name in ("input_ids", "attention_mask") if name not in accepted]
    if missing:
        raise UserError(
            f"capture: {type(model).__name__}.forward has no argument {missing[0]!r}; a causal "
            "language model takes input_ids, attention_mask and, optionally, position_ids"
        )
    if getattr(model, "is_activation_checkpointing", False):
        raise UserError(
            "capture: the model has activation checkpointing on, which a graph would lose; call "
            "model.activation_checkpointing_disable()"
        )


def _windows(config: Any) -> dict[str, int | None]:
    """The kinds of attention that layers have, each with its window (None: everything before).

    A `transformers` model given one 4-D mask uses it in every layer as it is. Where layers have
    sliding windows, these must be laid into the mask, one for each kind of layer.
    """
    if config is None:
        return {"full_attention": None}
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    if not kinds:
        kinds = ["sliding_attention" if window else "full_attention"]
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(
            f"capture: layers of type {sorted(unknown)[0]!r} are not supported; "
            "known: full_attention, sliding_attention"
        )
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _export(model: nn.Module, windows: Mapping[str, int | None]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2, max=1 << 16)
    seq = torch.export.Dim("seq", min=2, max=1 << 20)
    device = next(model.parameters()).device
    # Sizes of two and more, that are no size of a usual model: torch.export specialises on 1.
    ids = torch.zeros(3, 11, dtype=torch.int64, device=device)
    mask = torch.ones(3, 1, 11, 11, dtype=torch.bool, device=device).tril()
    positions = torch.arange(11, device=device).expand(3, -1).contiguous()
    accepted = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {"input_ids": ids}
    kwargs["attention_mask"] = mask if len(windows) == 1 else {k: mask.clone() for k in windows}
    if "position_ids" in accepted:
        kwargs["position_ids"] = positions
    if "use_cache" in accepted:
        kwargs["use_cache"] = False
    shape = {2: {0: batch, 1: seq}, 4: {0: batch, 2: seq, 3: seq}}

    def dynamic(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: dynamic(v) for k, v in value.items()}
        return shape[value.dim()] if isinstance(value, Tensor) else None

    was_training = model.training
    try:
        with torch.enable_grad():
            return torch.export.export(
                model.train(), (), kwargs, dynamic_shapes=dynamic(kwargs), strict=False
            )
    finally:
        model.train(was_training)


def _check_dynamic(graph: fx.Graph) -> None:
    logits = graph.output_node().args[0].meta["val"]
    if logits.dim() != 3 or not all(size_symbol(size) for size in logits.shape[:2]):
        raise UserError(
            f"capture: the output has shape {tuple(logits.shape)}; a causal language model gives "
            "logits (batch, seq, vocab) with batch and seq free"
        )
