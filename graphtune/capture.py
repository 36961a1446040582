"""From an `nn.Module` to a Program: `torch.export`, then the clean-up that every pass needs."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphtune.capture_cache import cache_file, keep, recall
from graphtune.errors import UserError
from graphtune.models.transformer import Transformer
from graphtune.normalize import normalize
from graphtune.program import Deferred, ModelInfo, Program
from graphtune.torch_private import size_symbol
from graphtune.weights import fingerprint


def capture(model: nn.Module) -> Program:
    """Capture the forward of a causal language model as a Program.

    The model is traced once, without gradients being lost: non-strict `torch.export` in train
    mode, with dynamic batch and sequence, an explicit boolean attention mask and positions. The
    program shares the model's parameters.

    Whatever the model's attention needs, the program's inputs are the same three: windows of
    layers and the additive mask of eager attention are derived from the boolean one in the graph.
    Experts are captured as grouped matrix products.

    Args:
        model: forward takes `input_ids`, `attention_mask` and, optionally, `position_ids`, and
            returns logits or an output with `.logits`. Any `transformers` causal model is one.
            One that `load_model` put on the meta device gives a program without weights, whose
            other constants (rotary frequencies) are real.

    Raises:
        UserError: the model cannot be captured as it is; the message says why.
    """
    _check(model)
    path = cache_file(model)
    if path is not None and (kept := recall(path, model)) is not None:
        return kept
    # Our own decoder lays the windows of its layers into the one mask itself.
    own = isinstance(model, Transformer)
    windows = _windows(None if own else getattr(model, "config", None))
    exported = _export(model, windows)
    graph_module = exported.module(check_guards=False)
    graph = normalize(graph_module, exported.call_spec.out_spec, windows)
    _check_dynamic(graph)
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    buffers = _buffers(model, graph_module, graph)
    empty = any(parameter.is_meta for parameter in parameters.values())
    info = ModelInfo(
        source=getattr(model, "graphtune_source", None),
        config=getattr(model, "config", None),
        model_class=type(model).__name__,
        fingerprint=None if empty else fingerprint(parameters),
    )
    checkpoint = parameters | {name: b for name, (b, is_saved) in buffers.items() if is_saved}
    deferred = Deferred(checkpoint) if empty else None
    program = Program(graph, parameters, buffers, info, deferred=deferred).train(model.training)
    if path is not None:
        keep(path, program)
    return program


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
    attention = _attention(model)
    if attention not in (None, "sdpa", "eager"):
        raise UserError(
            f"capture: attention {attention!r} cannot be captured; call "
            "model.set_attn_implementation('sdpa')"
        )
    config = getattr(model, "config", None)
    experts = getattr(config, "_experts_implementation", None)
    has_experts = getattr(model, "_can_set_experts_implementation", lambda: False)()
    if has_experts and experts == "eager":
        raise UserError(
            "capture: the model runs its experts one by one, as the tokens' choice demands, which "
            "no graph can hold; call model.set_experts_implementation('grouped_mm')"
        )


def _attention(model: nn.Module) -> str | None:
    """Which of the implementations of attention a `transformers` model uses."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "_attn_implementation", None)


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
    if _attention(model) == "eager":  # adds the mask to its scores
        mask = torch.zeros(mask.shape, dtype=_compute_dtype(model), device=device)
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


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of hidden states; single parameters, such as a router's, may have another."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    return (next(model.parameters()) if weight is None else weight).dtype


def _buffers(
    model: nn.Module, graph_module: fx.GraphModule, graph: fx.Graph
) -> dict[str, tuple[Tensor, bool]]:
    """All tensors that the graph reads but parameters, with whether `state_dict` holds them.

    They are the model's buffers and the constants that its forward makes. Of a model on the meta
    device, those that no checkpoint brings take the values that `load_model` kept aside.
    """
    saved = graph_module.state_dict(keep_vars=True).keys()
    buffers = dict(graph_module.named_buffers(remove_duplicate=False))
    for node in graph.find_nodes(op="get_attr"):
        constant = getattr(graph_module, node.target, None)  # its name has no dots
        if isinstance(constant, Tensor) and not isinstance(constant, nn.Parameter):
            buffers.setdefault(node.target, constant)
    real: dict[str, Tensor] | None = getattr(model, "graphtune_buffers", None)
    if real is not None:
        buffers |= {name: real[name] for name in buffers.keys() & real.keys()}
        lost = [name for name, value in buffers.items() if value.is_meta and name not in saved]
        if lost:
            raise UserError(
                f"capture: {type(model).__name__} makes a constant ({lost[0]}) in its forward, "
                "which has no value on the meta device; load the model with its weights instead"
            )
    return {name: (buffer, name in saved) for name, buffer in buffers.items()}


def _check_dynamic(graph: fx.Graph) -> None:
    logits = graph.output_node().args[0].meta["val"]
    if logits.dim() != 3 or not all(size_symbol(size) for size in logits.shape[:2]):
        raise UserError(
            f"capture: the output has shape {tuple(logits.shape)}; a causal language model gives "
            "logits (batch, seq, vocab) with batch and seq free"
        )
