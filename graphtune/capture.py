"""From an `nn.Module` to a Program: `torch.export`, then the clean-up that every pass needs."""

import inspect
import re
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from graphtune.capture_cache import cache_file, keep, recall
from graphtune.errors import UserError
from graphtune.masks import causal_mask, default_position_ids
from graphtune.models.images import PIXELS, ImageModel, image_model
from graphtune.models.patches import exportable
from graphtune.normalize import normalize
from graphtune.program import Deferred, ModelInfo, Program
from graphtune.sites import module_of
from graphtune.torch_private import size_at, size_symbol
from graphtune.weights import fingerprint


def capture(model: nn.Module, *, images: bool = False) -> Program:
    """Capture the forward of a causal language model as a Program.

    The model is traced once, without gradients being lost: non-strict `torch.export` in train
    mode, with dynamic batch and sequence, an explicit boolean attention mask and positions. The
    program shares the model's parameters; those that the forward does not use are frozen in it.

    Whatever a `transformers` model does, the program's inputs are the same three, and windows,
    chunks, the additive mask of eager attention and the padding that recurrent layers skip are
    derived from the boolean mask in the graph (see `graphtune.models.patches`). Recurrences are
    single operators, which run the model's own code (see `graphtune.models.kernels`). Experts are
    captured as grouped matrix products.

    Some models cannot use all of a mask. Recurrent layers (Mamba, linear attention, RWKV) read
    from it which tokens are padding, and no more: texts packed into one row run into each other,
    and RWKV and xLSTM do not even leave out padding. So do short convolutions. Models that lay
    their own causal mask (OpenAI GPT, XLM, XLNet) take the padding alone, too.

    `docs/coverage.md` lists the architectures that were tried.

    Args:
        model: forward takes `input_ids`, `attention_mask` and, optionally, `position_ids`, and
            returns logits or an output with `.logits`. Any `transformers` causal model is one.
            One that `load_model` put on the meta device gives a program without weights, whose
            other constants (rotary frequencies) are real.
        images: of a vision-language model, capture its vision part too. The program then takes
            `pixel_values` besides, and what else the model needs to be told of images; see
            `graphtune.models.images`. Without them it is a program for text, as every other.

    Raises:
        UserError: the model cannot be captured as it is; the message says why.
    """
    _check(model)
    taken = image_model(getattr(model, "config", None)) if images else None
    path = cache_file(model, images)
    if path is not None and (kept := recall(path, model)) is not None:
        return kept
    exported, least = _export(model, taken)
    graph_module = exported.module(check_guards=False)
    doubtful = _doubtful_sizes(graph_module.graph, _longest(model))
    doubtful += [(2, length) for length in (2, 3, 7, 15) if length < least]
    graph = normalize(graph_module, model, taken.inputs if taken else ())
    _check_dynamic(graph)
    parameters = _parameters(graph_module, graph)
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
    _check_sizes(model, program, doubtful)
    if path is not None:
        keep(path, program)
    return program


def _check(model: nn.Module) -> None:
    accepted = inspect.signature(model.forward).parameters
    needed = (
        ("input_ids",) if isinstance(model, PreTrainedModel) else ("input_ids", "attention_mask")
    )
    missing = [name for name in needed if name not in accepted]
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


# What to trace at: the length, and the least length that is to be proven. `torch.export` takes 1
# for a constant; models of short convolutions or of blocks do something else at a few more.
_TRACES = ((11, 2), (37, 16))


def _export(
    model: nn.Module, images: ImageModel | None
) -> tuple[torch.export.ExportedProgram, int]:
    """The exported model, and the least length at which `torch.export` vouches for it."""
    was_training = model.training
    model.train()
    try:
        for last, (length, least) in enumerate(_TRACES, 1 - len(_TRACES)):
            try:
                with torch.enable_grad(), exportable(model, images.inputs if images else ()):
                    return _export_at(model, images, length, least), least
            except UserError:
                raise
            except Exception as error:  # of whatever kind, it is about the model
                if last == 0:
                    raise UserError(
                        f"capture: {type(model).__name__} cannot be exported: {_first_lines(error)}"
                    ) from error
    finally:
        model.train(was_training)
    raise AssertionError("the last trace returns or raises")


def _export_at(
    model: nn.Module, images: ImageModel | None, length: int, least: int
) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2, max=1 << 16)
    seq = torch.export.Dim("seq", min=least, max=_longest(model))
    device = next(model.parameters()).device
    inputs: tuple[Tensor, ...] = (
        torch.zeros(3, length, dtype=torch.int64, device=device),
        torch.ones(3, 1, length, length, dtype=torch.bool, device=device).tril(),
        torch.arange(length, device=device).expand(3, -1).contiguous(),
    )
    dynamic = ({0: batch, 1: seq}, {0: batch, 2: seq, 3: seq}, {0: batch, 1: seq})
    if images is not None:
        many = torch.export.Dim("images", min=2, max=1 << 16)
        blank = images.blank(inputs[0], 5)
        inputs = (*inputs, *blank.values())
        sizes = tuple({0: many} if name == PIXELS else {0: batch, 1: seq} for name in blank)
        dynamic = (*dynamic, sizes)  # type: ignore[assignment]  # of the arguments behind a star
    return torch.export.export(
        model,
        inputs,
        dynamic_shapes=dynamic,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _first_lines(error: Exception) -> str:
    """What an error of torch says before its advice, on one line."""
    text = re.split(r"Suggested fix|Caused by|\n\n", str(error))[0]
    text = text.replace('For more information, run with TORCH_LOGS="+dynamic".', "")
    return " ".join(text.split())[:300] or type(error).__name__


def _parameters(graph_module: fx.GraphModule, graph: fx.Graph) -> dict[str, nn.Parameter]:
    """All parameters by name. What the graph does not read cannot get a gradient, so it is frozen
    in the program: the vision part of a model that is captured for text, say."""
    named = dict(graph_module.named_parameters(remove_duplicate=False))
    read = {id(named.get(str(node.target))) for node in graph.find_nodes(op="get_attr")}
    frozen: dict[int, nn.Parameter] = {}
    for name, parameter in named.items():
        if parameter.requires_grad and id(parameter) not in read:
            alias = nn.Parameter(parameter.detach(), requires_grad=False)
            named[name] = frozen.setdefault(id(parameter), alias)
    return named


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
        module, _, leaf = str(node.target).rpartition(".")
        constant = getattr(graph_module.get_submodule(module), leaf, None)
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


# Lengths around those at which code that works in blocks does something else.
_LENGTHS = [*range(2, 21), *(2**k + d for k in range(5, 10) for d in (-1, 0, 1))]


def _doubtful_sizes(graph: fx.Graph, longest: int) -> list[tuple[int, int]]:
    """Sizes (batch, seq) at which something is not so that the trace took for granted.

    What `torch.export` cannot prove it writes into the graph as assertions on sizes. Most hold for
    all sizes; of the others, most are about memory layouts and change no result.
    """
    sizes = [(2, length) for length in _LENGTHS if length <= longest] + [(5, 11), (8, 11)]
    asserted = graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default)
    conditions = [node.args[0] for node in asserted if isinstance(node.args[0], fx.Node)]
    ids = next(iter(graph.find_nodes(op="placeholder"))).meta["val"]
    names = [size_symbol(size) for size in ids.shape]
    doubtful: dict[tuple[int, int], None] = {}
    for condition in dict.fromkeys(conditions):
        for size in sizes:
            symbols = dict(zip(map(str, names), size, strict=True))
            if not _value(condition, symbols):
                doubtful.setdefault(size)
                break
    return list(doubtful)


def _value(of: Any, symbols: dict[str, int]) -> Any:
    """What a node computes from sizes; true where that depends on the values of tensors."""
    if not isinstance(of, fx.Node):
        return of
    value = of.meta["val"]
    if isinstance(value, torch.SymBool):
        return of.target(*(_value(argument, symbols) for argument in of.args))
    try:
        return size_at(value, symbols)
    except KeyError:
        return True


@torch.no_grad()
def _check_sizes(model: nn.Module, program: Program, sizes: list[tuple[int, int]]) -> None:
    """Compare the program with the model at sizes at which it might compute something else."""
    if not sizes:
        return
    if program.deferred is not None:
        raise UserError(
            f"capture: whether {type(model).__name__} is the same graph at all lengths can be "
            "told only from its results; load the model with its weights instead"
        )
    was_training = model.training
    model.eval(), program.eval()
    try:
        for batch, length in sizes:
            ids = torch.arange(batch * length, device=next(model.parameters()).device)
            ids = (ids % 61 + 3).view(batch, length)
            if not _same_logits(model, program, ids):
                raise UserError(
                    f"capture: {type(model).__name__} computes something else at length {length} "
                    "than at the length it was traced at, so that no one graph can hold it"
                )
    finally:
        model.train(was_training), program.train(was_training)


def _same_logits(model: nn.Module, program: Program, ids: Tensor) -> bool:
    mask, positions = causal_mask(ids, None), default_position_ids(ids, None)
    try:
        with exportable(model):  # a program of images takes text alone, too
            expected = model(ids, mask, positions)
    except Exception:  # the model itself cannot take so many or so few tokens
        return True
    try:
        found = program(ids, mask, positions)
    except Exception:  # a shape that was taken for granted does not fit
        return False
    return float((found - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


def _longest(model: nn.Module) -> int:
    """The longest sequence that a model has positions for."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
    found = [getattr(config, name, None) for name in names]
    return next((one for one in found if isinstance(one, int) and one > 1), 1 << 20)


def _check_dynamic(graph: fx.Graph) -> None:
    logits = graph.output_node().args[0].meta["val"]
    if logits.dim() != 3 or not all(size_symbol(size) for size in logits.shape[:2]):
        raise UserError(
            f"capture: the output has shape {tuple(logits.shape)}; a causal language model gives "
            "logits (batch, seq, vocab) with batch and seq free"
        )
    inputs = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    free = [size_symbol(size) for value in inputs for size in value.shape]
    symbols = {str(symbol): 2 for symbol in free if symbol is not None}
    for node in graph.nodes:
        if not _sizes_known(node.meta.get("val"), symbols):
            raise UserError(
                f"capture: {module_of(node)[0] or 'the model'} makes a tensor whose size depends "
                "on the values of another, as to run experts one by one, which no graph can hold"
            )


def _sizes_known(value: Any, symbols: dict[str, int]) -> bool:
    sizes = value.shape if isinstance(value, Tensor) else [value]
    try:
        for size in sizes:
            if isinstance(size, torch.SymInt):
                size_at(size, symbols)
    except KeyError:
        return False
    return True
