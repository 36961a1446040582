"""Optimizers that torch does not have as they are needed here.

Any optimizer is a component that is called with named parameters; torch's own, torchao's and
those of `schedulefree` need nothing from this file.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from graphtune.errors import UserError

NamedParameters: TypeAlias = Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]

EMBEDDINGS_AND_HEADS = ("*embed*", "*wte*", "*wpe*", "*lm_head*")


class MuonWithAdamW(Optimizer):
    """Muon for hidden matrices, AdamW for everything else, as one optimizer.

    Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) makes the momentum of a matrix
    orthogonal, which means nothing for an embedding, an output head, a norm, a bias or a stack of
    experts. The arithmetic is that of `torch.optim.Muon` and `torch.optim.AdamW`. With the scale
    that is the default, an update is as large as AdamW's (Liu et al., arXiv:2502.16982), so that
    one learning rate and one weight decay serve both.

    Args:
        params: names and parameters, or groups of them with options of their own.
        lr: learning rate of Muon.
        adamw_lr: of AdamW; None for the same. The `lr` of a group scales both.
        weight_decay: of both.
        momentum: of Muon, as are the three options after it; see `torch.optim.Muon`.
        nesterov: whether the momentum looks ahead.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: how an update's scale depends on its shape, `match_rms_adamw` or `original`.
        betas: of AdamW, as is `eps`.
        eps: added to AdamW's denominator.
        adamw_parameters: globs on the names of matrices that AdamW updates nonetheless.

    Raises:
        UserError: the parameters come without names.
    """

    def __init__(
        self,
        params: NamedParameters,
        lr: float = 1e-3,
        *,
        adamw_lr: float | None = None,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adamw_parameters: Sequence[str] = EMBEDDINGS_AND_HEADS,
    ) -> None:
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        ratio = 1.0 if adamw_lr is None else adamw_lr / lr
        for named, options in _groups(params):
            split: tuple[list[tuple[str, Tensor]], ...] = ([], [])
            for name, parameter in named:
                by_name = any(fnmatch.fnmatchcase(name, glob) for glob in adamw_parameters)
                split[by_name or parameter.dim() != 2].append((name, parameter))
            if split[0]:
                matrices.append({**options, "params": split[0]})
            if split[1]:
                own_lr = options.get("lr", lr) * ratio
                others.append({**options, "params": split[1], "lr": own_lr})
        self._muon = matrices and torch.optim.Muon(
            matrices,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        self._adamw = others and torch.optim.AdamW(
            others, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay
        )
        parts = [part for part in (self._muon, self._adamw) if part]
        # The same dictionaries, so that a schedule that changes them here changes them there.
        super().__init__([g for part in parts for g in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, is_muon in ((self._muon, True), (self._adamw, False)):
            groups = [g for g in self.param_groups if ("ns_steps" in g) == is_muon]
            if part and groups:  # a loaded state brings groups and state of its own
                part.param_groups, part.state = groups, self.state
                part.step()
        return loss


class OptimizerInBackward(Optimizer):
    """Updates each parameter as soon as its gradient is there, and frees the gradient.

    Lv et al., arXiv:2306.09782; the gradients of all parameters never exist together, as far as
    the backward pass makes them one by one. A compiled one hands over those of the whole graph at
    its end: use it with `compile=false` where memory is what counts.

    To a schedule, and to who saves it, it is the optimizer it was made from: the same groups, the
    same state. What needs all gradients before the first update cannot be had: clipping, and
    accumulation over several backward passes.

    Args:
        optimizer: over all parameters; its own `step` is not to be called any more.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.norms: dict[Tensor, Tensor] = {}  # of the gradients since the last `step`
        self._advanced: dict[int, dict[str, Any]] = {}  # groups by number, after a step
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.state = optimizer.state
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(number))
            for number, group in enumerate(self.param_groups)
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def _hook(self, number: int) -> Any:
        def update(parameter: Tensor) -> None:
            if parameter in self.norms:
                raise UserError(
                    "an optimizer in backward takes one backward pass for each step: set "
                    "`gradient_accumulation_steps=1`"
                )
            assert parameter.grad is not None
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            self.norms[parameter] = norm
            if not math.isfinite(norm):  # who asks for the norm will know
                parameter.grad = None
                return
            # Some optimizers count steps in the group: each parameter's step counts from the same.
            group = {**self.param_groups[number], "params": [parameter]}
            whole, self.optimizer.param_groups = self.optimizer.param_groups, [group]
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups = whole
            parameter.grad = None
            self._advanced[number] = group

        return update

    def grad_norm(self) -> Tensor:
        """2-norm of the gradient of the backward pass since the last `step`, a scalar float32."""
        device = self.param_groups[0]["params"][0].device
        norms = [norm.to(device) for norm in self.norms.values()]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def step(self, closure: Any = None) -> Any:
        """End the step that the backward pass has taken; updates nothing."""
        for number, group in self._advanced.items():
            own = {key: value for key, value in group.items() if key not in _PARAMETERS}
            self.param_groups[number].update(own)
        self._forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also forget a backward pass that `step` did not follow, since it came to nothing."""
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self) -> None:
        self.norms.clear()
        self._advanced.clear()

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer it was made from, which can load it."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def remove(self) -> None:
        """Leave the parameters alone: a backward pass gives them gradients again."""
        for handle in self._handles:
            handle.remove()


_PARAMETERS = ("params", "param_names")


def _groups(params: NamedParameters) -> Iterable[tuple[list[tuple[str, Tensor]], dict[str, Any]]]:
    """Named parameters and the options of each group."""
    given: list[Any] = list(params)
    for group in given if given and isinstance(given[0], Mapping) else [{"params": given}]:
        named = list(group["params"])
        if not all(isinstance(one, tuple) for one in named):
            raise UserError(
                "Muon must know which parameters are embeddings: give it pairs of name and "
                "parameter, such as program.named_parameters()"
            )
        yield named, {key: value for key, value in group.items() if key not in _PARAMETERS}
