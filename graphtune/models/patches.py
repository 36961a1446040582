"""What makes a `transformers` model exportable, put in place for the time of the export only.

Two kinds of things. First the masks: `transformers` makes the mask of each kind of layer from the
padding by code that looks at the data, and takes a mask that has four dimensions as it is, windows
or not. While `exportable` holds, its functions for masks are ours, which lay windows, chunks and
the rest into one boolean mask. Second a few methods of single architectures that branch on values
of tensors, replaced by equals that do not.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import NormalDist
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from graphtune.errors import UserError
from graphtune.models.images import IMAGE_METHODS
from graphtune.models.kernels import as_operator


@contextmanager
def exportable(model: nn.Module, images: Sequence[str] = ()) -> Iterator[None]:
    """Within it, `model.forward(input_ids, attention_mask, position_ids, *images)` returns logits.

    The mask is boolean, (batch, 1, seq, seq), whatever the kinds of layers and of attention;
    positions count from 0.

    Args:
        images: names of the model's arguments for images, see `graphtune.models.images`.
    """
    with ExitStack() as stack:
        for owner, name, ours in [*_replacements(model, images)]:
            stack.enter_context(mock.patch.object(owner, name, ours))
        yield


def _replacements(model: nn.Module, images: Sequence[str]) -> Iterator[tuple[Any, str, Any]]:
    """What holds an attribute, the attribute's name, and what it is to be."""
    modules = _source_modules(model)
    for module in modules:
        here = vars(module)
        for name, mask in _MASKS.items():
            if here.get(name) is getattr(masking_utils, name):
                yield module, name, _ours_if(mask, here[name])
        for name, wrap in _FUNCTIONS.items():
            if name in here:
                yield module, name, wrap(here[name])
        if images and "torch_compilable_check" in here:  # how many tokens stand for how many images
            yield module, "torch_compilable_check", lambda *_, **__: None
        for (name, method), wrap in (_METHODS | IMAGE_METHODS).items():
            if name in here and here[name].__module__ == module.__name__:
                yield here[name], method, wrap(getattr(here[name], method))
    for part in model.modules():
        # In training it clips two weights in place at each forward, which no graph can.
        if type(part).__name__ == "Gemma3nTextAltUp":
            yield part, "training", False
    makes_masks = any(name in vars(module) for module in modules for name in _MASKS)
    padding_only = isinstance(model, PreTrainedModel) and not makes_masks
    yield model, "forward", _forward(model, padding_only, images)


def _forward(model: nn.Module, padding_only: bool, images: Sequence[str]) -> Callable[..., Tensor]:
    """The model's forward with our three arguments, and those of images.

    Args:
        padding_only: the model has its own causal mask, and takes but (batch, seq) for padding.
        images: names of the latter.
    """
    theirs = model.forward
    accepted = inspect.signature(theirs).parameters
    first = _first_position(model)

    def forward(
        input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *of_images: Tensor
    ) -> Tensor:
        mask = _not_padding(attention_mask).long() if padding_only else attention_mask
        positions = position_ids + first if first else position_ids
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
        inputs |= dict(zip(images, of_images, strict=True))
        return _logits(theirs(**_known(accepted, inputs)))

    return forward


def _known(accepted: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in inputs.items() if name in accepted}
    kinds = [parameter.kind for parameter in accepted.values()]
    if "use_cache" in accepted or inspect.Parameter.VAR_KEYWORD in kinds:
        known["use_cache"] = False
    return known


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def _first_position(model: nn.Module) -> int:
    """The position of a text's first token: models after RoBERTa begin behind the padding's."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids") and module is not model:
            return int(getattr(module, "padding_idx", -1)) + 1
    return 0


def _source_modules(model: nn.Module) -> list[Any]:
    """The Python modules that define the classes of a model."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    names = {one.__module__ for one in classes}
    shared = {name for name in names if name.startswith(("torch.", "transformers."))}
    shared = {name for name in shared if not name.startswith("transformers.models.")}
    return [sys.modules[name] for name in sorted(names - shared) if name in sys.modules]


# Masks. The functions that they stand for are in `transformers.masking_utils`; `attention_mask` is
# always our boolean one here.


def _full(config: Any, inputs_embeds: Tensor, attention_mask: Tensor, *_: Any, **__: Any) -> Tensor:
    return _as_used(config, attention_mask, inputs_embeds.dtype)


def _sliding(
    config: Any, inputs_embeds: Tensor, attention_mask: Tensor, *_: Any, **__: Any
) -> Tensor:
    """Only the last `sliding_window` keys up to each query."""
    index = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    near = index[:, None] - index[None, :] < config.sliding_window
    return _as_used(config, attention_mask & near, inputs_embeds.dtype)


def _chunked(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    past_key_values: Any = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Only keys of the query's own chunk, counted from where its text begins."""
    if position_ids is None:
        position_ids = torch.arange(attention_mask.shape[-1], device=attention_mask.device)[None]
    chunk = position_ids // config.attention_chunk_size
    same = (chunk[:, :, None] == chunk[:, None, :])[:, None]
    return _as_used(config, attention_mask & same, inputs_embeds.dtype)


def _recurrent(
    config: Any, inputs_embeds: Tensor, attention_mask: Tensor, *_: Any, **__: Any
) -> Tensor:
    return _not_padding(attention_mask)


def _not_padding(attention_mask: Tensor) -> Tensor:
    """Bool (batch, seq), False at padding: what attends to itself alone, and nothing to it.

    A last token is never taken for padding: nothing comes after it, and padding there is harmless.
    """
    index = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    others = attention_mask[:, 0] & (index[:, None] != index[None, :])
    linked = others.any(-1) | others.any(-2)
    return linked | (index == attention_mask.shape[-1] - 1)


def _later(
    config: Any, inputs_embeds: Tensor, attention_mask: Tensor, *_: Any, **__: Any
) -> Tensor:
    """The mask itself: a model of images hands it on to its model of text, which lays it out."""
    return attention_mask


def _with_images(_: Callable[..., Any]) -> Callable[..., dict[str, Tensor]]:
    """Tokens of one image see each other; windows hold for them too."""

    def ours(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        *,
        block_sequence_ids: Tensor,
        **_: Any,
    ) -> dict[str, Tensor]:
        image = block_sequence_ids  # (batch, seq), -1 at text
        same = (image[:, :, None] == image[:, None, :]) & (image >= 0)[:, :, None]
        mask = attention_mask | same[:, None]
        kinds = {"full_attention": _full, "sliding_attention": _sliding}
        return {kind: make(config, inputs_embeds, mask) for kind, make in kinds.items()}

    return ours


def _as_used(config: Any, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the model's attention takes it: eager attention adds it to its scores."""
    if config._attn_implementation != "eager":
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def _ours_if(ours: Callable[..., Tensor], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Our function where it is our mask that is given, theirs for others, such as an encoder's."""

    def make_mask(
        config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        is_ours = attention_mask is not None and attention_mask.dim() == 4
        return (ours if is_ours else theirs)(config, inputs_embeds, attention_mask, *args, **kwargs)

    return make_mask


_MASKS: dict[str, Callable[..., Tensor]] = {
    "create_causal_mask": _full,
    "create_bidirectional_mask": _full,
    "create_sliding_window_causal_mask": _sliding,
    "create_chunked_causal_mask": _chunked,
    "create_recurrent_attention_mask": _recurrent,
    "create_masks_for_generate": _later,
}


def _with_padding_mask(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes a mask (batch, seq) of what is not padding, given our mask."""

    def ours(attention_mask: Tensor, *args: Any, **kwargs: Any) -> Any:
        return theirs(_not_padding(attention_mask).long(), *args, **kwargs)

    return ours


def _refuse_sampling(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def ours(*args: Any, **kwargs: Any) -> Any:
        raise UserError(
            "capture: the model draws its experts at random in training and takes the best in "
            "evaluation, and one graph can hold but one of the two"
        )

    return ours


def _gaussian_topk(self: Any, inputs: Tensor) -> Tensor:
    """Gemma 3n's sparsity with its quantile of the normal distribution as a number."""
    quantile = NormalDist().inv_cdf(self.activation_sparsity)
    mean = inputs.mean(-1, keepdim=True)
    return torch.relu(inputs - (mean + inputs.std(-1, keepdim=True, unbiased=False) * quantile))


def _rnn_scan(theirs: Callable[..., Any]) -> Callable[..., Any]:
    operator = as_operator(theirs, "hidden_states", pair=True)
    return lambda self, *args, **kwargs: operator(None, *args, **kwargs)


# Experts that are run one by one, as the tokens' choice demands. All of them run on all tokens
# here, and what was not chosen counts nothing: slower, with the same gradients.


def _dbrx_experts(self: Any, hidden_states: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    tokens = hidden_states.reshape(-1, self.hidden_size)
    parts = [
        weight.view(-1, self.ffn_hidden_size, self.hidden_size)
        for weight in (self.mlp.w1, self.mlp.v1, self.mlp.w2)
    ]
    total = torch.zeros_like(tokens)
    for expert in range(self.num_experts):
        out = self.mlp(tokens, *(part[expert] for part in parts))
        total = total + out * (shares * (chosen == expert)).sum(-1, keepdim=True)
    return total.view_as(hidden_states)


def _longcat_experts(self: Any, hidden_states: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Experts behind those that have weights hand a token on as it is."""
    itself = chosen >= self.num_routed_experts
    total = hidden_states * (shares * itself).sum(-1, keepdim=True).to(hidden_states.dtype)
    for expert in range(self.num_routed_experts):
        both = nn.functional.linear(hidden_states, self.gate_up_proj[expert])
        gate, up = both.chunk(2, dim=-1)
        out = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
        share = (shares * (chosen == expert)).sum(-1, keepdim=True)
        total = total + (out * share).to(total.dtype)
    return total


def _xmod_adapter(self: Any, lang_ids: Tensor, hidden_states: Tensor) -> Tensor:
    """The adapter of each row's language."""
    given = hidden_states
    if self.adapter_layer_norm is not None:
        hidden_states = self.adapter_layer_norm(hidden_states)
    elif self.adapter_reuse_layer_norm:
        hidden_states = self.LayerNorm(hidden_states)
    residual = hidden_states if self.ln_before_adapter else given
    adapted = torch.zeros_like(hidden_states)
    for number, adapter in enumerate(self.adapter_modules.values()):
        speaks = (lang_ids == number)[:, None, None]
        adapted = torch.where(speaks, adapter(hidden_states), adapted)
    return self.dropout(adapted) + residual


# JetMoe sorts rows by expert and splits them by counts; the counts stay a tensor here.


def _jetmoe_gating(self: Any, hidden_states: Tensor) -> tuple[Tensor, ...]:
    logits = self.layer(hidden_states).float()
    best, chosen = logits.topk(self.top_k, dim=1)
    shares = torch.softmax(best, dim=1).type_as(hidden_states).flatten()
    experts = torch.arange(self.num_experts, device=chosen.device)
    counts = (chosen.flatten()[:, None] == experts).sum(0)
    order = chosen.flatten().sort(0).indices
    return order, order // self.top_k, shares[order], counts, logits


def _jetmoe_experts(self: Any, inputs: Tensor, expert_size: Tensor) -> Tensor:
    last = expert_size.cumsum(0)
    number = (torch.arange(inputs.shape[0], device=inputs.device)[:, None] >= last).sum(-1)
    total = inputs.new_zeros(inputs.shape[0], self.weight.shape[1])
    for expert in range(self.num_experts):
        out = nn.functional.linear(inputs, self.weight[expert])
        total = torch.where((number == expert)[:, None], out, total)
    return total


# Methods, by class and name.
_METHODS: dict[tuple[str, str], Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    ("DbrxExperts", "forward"): lambda _: _dbrx_experts,
    ("JetMoeParallelExperts", "forward"): lambda _: _jetmoe_experts,
    ("JetMoeTopKGating", "forward"): lambda _: _jetmoe_gating,
    ("LongcatFlashExperts", "forward"): lambda _: _longcat_experts,
    ("XmodOutput", "lang_adapter"): lambda _: _xmod_adapter,
    ("FalconLinear", "forward"): lambda _: nn.Linear.forward,  # an operator that passes know
    ("Gemma3nTextMLP", "_gaussian_topk"): lambda _: _gaussian_topk,
    ("RecurrentGemmaRglru", "_rnn_scan"): _rnn_scan,
}

# Functions, by name, in whichever module of a model they are.
_FUNCTIONS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "build_alibi_tensor": _with_padding_mask,
    "create_masks_for_vision_model": _with_images,
    "chunk_kimi_delta_attention": partial(as_operator, like="value", pair=True),
    "mamba_selective_scan": partial(as_operator, like="hidden_states", pair=False),
    "mamba2_chunk_scan": partial(as_operator, like="hidden_states", pair=False),
    "sparsemixer": _refuse_sampling,
    "rwkv_linear_attention": partial(as_operator, like="key", pair=True),
    "torch_chunk_gated_delta_rule": partial(as_operator, like="value", pair=True),
}
