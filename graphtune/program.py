"""The Program: one captured forward, its parameters under their own names, and a ledger."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from graphtune.distributed import Distribution, Part
from graphtune.errors import UserError
from graphtune.masks import causal_mask, default_position_ids
from graphtune.models.images import IMAGE_INPUTS, PIXELS, blank_images

if TYPE_CHECKING:
    from graphtune.inspect.memory import MemoryEstimate


INPUTS = ("input_ids", "attention_mask", "position_ids")
"""What every program takes first."""


@dataclass(frozen=True)
class LedgerRow:
    """What one pass did. Counts are differences to the program that the pass was given."""

    name: str
    badge: str  # what the module tree shows at each site
    options: Mapping[str, Any]
    numerics: str
    sites: tuple[str, ...]
    nodes: int
    parameters: int
    trainable: int  # parameters that get a gradient, after the pass (a total, not a difference)
    bytes: int
    ms: float = field(compare=False)
    figures: Mapping[str, float] = field(default_factory=dict)  # what the pass measured


@dataclass(frozen=True)
class ModelInfo:
    """Where the weights came from.

    Attributes:
        source: what `load_model` was given (hub id, folder, file), or None.
        config: the model's `transformers` configuration, or None.
        model_class: name of the class that was captured.
        fingerprint: of the base weights, see `graphtune.weights`; None while there are none.
    """

    source: str | None
    config: Any
    model_class: str
    fingerprint: str | None = None


@dataclass(frozen=True)
class Fill:
    """Tensors that are computed once weights are there.

    Attributes:
        outputs: names of the tensors that `compute` returns.
        inputs: names of the tensors that it takes, as they are when all earlier fills have run.
        compute: called with the inputs, or, where there are none, with the device.
        part: where it is all that `compute` needs of its only input, and keeps.
    """

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    compute: Callable[..., tuple[Tensor, ...]]
    part: Part | None = None


@dataclass(frozen=True)
class Deferred:
    """What is left to do when the weights of a program on the meta device arrive.

    Attributes:
        checkpoint: the tensors that a checkpoint must bring, by name, with shape and dtype.
        fills: what passes compute from them, in the order in which passes were applied.
        claims: passes that claim the same output as before: name of the pass, its numerics class,
            the graph before, the graph after.
    """

    checkpoint: Mapping[str, Tensor]
    fills: tuple[Fill, ...] = ()
    claims: tuple[tuple[str, str, fx.Graph, fx.Graph], ...] = ()


class Program(nn.Module):
    """The captured forward of one causal language model.

    A program is an `nn.Module`: optimizers, `torch.compile`, `.to(device)` and `state_dict`
    work as people expect, and every parameter keeps its Hugging Face name. Passes rewrite a
    program into a new one with `apply`; tensors that a pass did not touch are shared.

    Attributes:
        graph_module: the graph in the pre-autograd training IR of `torch.export`; its inputs
            are `input_ids`, `attention_mask`, `position_ids`, those for images, if it takes some,
            and what a pass added (see `inputs`), its output the logits, or what a pass made of
            them.
        takes_mask: False for a program with a key-value cache, which knows from the positions
            what each token sees; its graph's inputs are `input_ids` and `position_ids`.
        takes_images: True for a program that was captured with images.
        ledger: one row for each pass that was applied, in order.
        info: where the weights came from.
        deferred: what `load_weights` must do; None where the weights are there.
        unmasked: the graph for calls without a mask, with the same inputs, or None where
            `graph_module` is that of all calls; see `graphtune.passes.CausalAttention`.
        packed: the graph for calls with `documents`, which it takes last, or None; likewise.
        takes_documents: whether there is one.
        unmerged: what this program was before a merge that was asked to keep it, or None.
        distribution: how it is spread over several processes, or None.
    """

    graph_module: fx.GraphModule
    unmasked: fx.GraphModule | None
    packed: fx.GraphModule | None
    unmerged: Program | None

    def __init__(
        self,
        graph: fx.Graph,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, tuple[Tensor, bool]],
        info: ModelInfo,
        ledger: Iterable[LedgerRow] = (),
        deferred: Deferred | None = None,
    ) -> None:
        """Build from a graph and the tensors it reads.

        Args:
            graph: reads its tensors by `get_attr` nodes whose targets are names below.
            parameters: by qualified name; tied ones are the same object under several names.
            buffers: by qualified name, with whether `state_dict` holds them.
            info: where the weights came from.
            ledger: what made this program.
            deferred: what is to be done when weights arrive.
        """
        super().__init__()
        for name, parameter in parameters.items():
            owner, leaf = self._owner(name)
            owner.register_parameter(leaf, parameter)
        for name, (buffer, persistent) in buffers.items():
            owner, leaf = self._owner(name)
            owner.register_buffer(leaf, buffer, persistent=persistent)
        # Not registered as a child, or each name would exist a second time.
        object.__setattr__(self, "graph_module", self._runnable(graph))
        object.__setattr__(self, "unmasked", None)
        object.__setattr__(self, "packed", None)
        object.__setattr__(self, "unmerged", None)
        self.takes_documents = False
        self.info = info
        self.ledger = tuple(ledger)
        self.deferred = deferred
        self.distribution: Distribution | None = None
        inputs = self.inputs
        self.takes_mask = "attention_mask" in inputs
        self.takes_images = PIXELS in inputs
        self._added = tuple(name for name in inputs if name not in INPUTS)
        self._of_images = tuple(name for name in self._added if name in IMAGE_INPUTS)
        self._image_size = tuple(inputs[PIXELS].shape[1:]) if self.takes_images else ()

    def _runnable(self, graph: fx.Graph) -> fx.GraphModule:
        graph_module = fx.GraphModule(self, graph, class_name="Program")
        # One set of tensors under two modules: the program's names carry no prefix, and what
        # happens to one (`.to`, loading) happens to the other.
        graph_module._parameters = self._parameters
        graph_module._buffers = self._buffers
        graph_module._modules = self._modules
        graph_module.training = self.training
        return graph_module

    def add_unmasked(self, graph: fx.Graph) -> None:
        """Run another graph, over the same tensors, when no mask is given."""
        object.__setattr__(self, "unmasked", self._runnable(graph))

    def add_packed(self, graph: fx.Graph) -> None:
        """Run another graph, over the same tensors, when documents are given."""
        object.__setattr__(self, "packed", self._runnable(graph))
        self.takes_documents = True

    def running(self, graph_module: Any) -> Program:
        """The same program with one graph for all calls, such as `unmasked` or `packed`."""
        other = copy.copy(self)
        object.__setattr__(other, "graph_module", graph_module)
        object.__setattr__(other, "unmasked", None)
        object.__setattr__(other, "packed", None)
        return other

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module, leaf

    @property
    def config(self) -> Any:
        """The model's `transformers` configuration, or None."""
        return self.info.config

    @property
    def source(self) -> str | None:
        """What `load_model` was given, or None."""
        return self.info.source

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def device(self) -> torch.device:
        """What it computes on, and where it takes its inputs."""
        if self.distribution is not None and self.distribution.offloaded:
            return self.distribution.device
        return next(self.parameters()).device

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Shape-only tensors of what the graph takes, by name."""
        return {str(n.target): n.meta["val"] for n in self.graph.find_nodes(op="placeholder")}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Tensor | None = None,
        **added: Tensor,
    ) -> Tensor:
        """Logits of every position, or what a pass made of them.

        Args:
            input_ids: int64 (batch, seq).
            attention_mask: bool (batch, 1, seq, seq), True where a query may attend to a key;
                or (batch, seq), nonzero where the token is not padding; without it, causal.
            position_ids: int64 (batch, seq); without it, counted from 0, and from the first
                token that is not padding where a (batch, seq) mask is given. A program with a
                key-value cache takes (seq,) too, and only it tells earlier tokens by them: see
                `graphtune.passes.KVCache`.
            documents: see `graphtune.masks.find_documents`: tokens see those of their document
                alone. For a program that `takes_documents`; with the mask that says the same,
                where its graph `packed` reads one.
            added: what else the graph's `inputs` has, by name. For images see
                `graphtune.image_inputs`; without, the program takes the ids for text. For
                `FusedLoss` see `graphtune.losses.labelled_rows`.

        Returns:
            Logits, (batch, seq, vocab), in the dtype of the weights; after `FusedLoss` the loss.
        """
        if self.deferred is not None:
            raise UserError("the program has no weights yet; graphtune.load_weights gives them")
        if self.takes_images and PIXELS not in added:
            added |= blank_images(self._of_images, self._image_size, input_ids)
        if len(added) != len(self._added) or any(name not in added for name in self._added):
            raise UserError(
                f"the program takes {', '.join(self._added) or 'nothing'} beside ids, mask and "
                f"positions; it was given {', '.join(added) or 'nothing'}"
            )
        if not self.takes_mask:
            if attention_mask is not None:
                raise UserError(
                    "a program with a key-value cache takes no attention_mask: what a token sees "
                    "is told by position_ids, which are negative at padding"
                )
            if position_ids is None:
                position_ids = default_position_ids(input_ids, None)
            return self.graph_module(input_ids, position_ids.expand(input_ids.shape[0], -1))
        if position_ids is None:
            position_ids = default_position_ids(input_ids, attention_mask)
        more = [added[name] for name in self._added]
        if documents is not None:
            if not self.takes_documents:
                raise UserError("the program takes no documents; give it an attention_mask")
            graph_module = self.packed or self.graph_module
            return graph_module(input_ids, attention_mask, position_ids, *more, documents)
        graph_module = self.graph_module
        if attention_mask is None and self.unmasked is not None:
            graph_module = self.unmasked
        if attention_mask is None or attention_mask.dim() == 2:
            attention_mask = causal_mask(input_ids, attention_mask)
        return graph_module(input_ids, attention_mask, position_ids, *more)

    def train(self, mode: bool = True) -> Program:
        """Switch dropout on (or off): the graph reads this flag where it drops."""
        super().train(mode)
        self.graph_module.training = mode
        for other in (self.unmasked, self.packed):
            if other is not None:
                other.training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Program:
        for parameter in self.parameters():
            if fn(parameter.new_empty(0)).dtype != parameter.dtype:
                raise UserError(
                    f"a program captured in {parameter.dtype} cannot be cast: its graph has the "
                    "casts of that dtype in it; choose it before capture, load_model(..., dtype=)"
                )
            break
        stay = self.distribution.offloaded if self.distribution else ()
        tensors = {**self.all_parameters(), **dict(self.named_buffers())}
        kept = {id(tensors[name]) for name in stay}
        super()._apply(lambda tensor: tensor if id(tensor) in kept else fn(tensor), recurse)
        return self

    def apply(self, *passes: Any) -> Program:
        """A new program, rewritten by the passes in the order of their stages.

        Args:
            passes: in any order, see `graphtune.passes`.

        Raises:
            UserError: a rule matches nothing, or two passes do not compose.
        """
        program = self
        parts = [part for one in passes for part in one.parts()]
        for one in sorted(parts, key=lambda one: (one.stage, one.order)):
            program = one(program)
        return program

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that get a gradient; what an optimizer should be given."""
        return (p for p in self.parameters() if p.requires_grad)

    def all_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name, tied ones under each of their names."""
        return dict(self.named_parameters(remove_duplicate=False))

    def all_buffers(self) -> dict[str, tuple[Tensor, bool]]:
        """Buffers by name, with whether `state_dict` holds them."""
        saved = self.state_dict(keep_vars=True).keys()
        return {n: (b, n in saved) for n, b in self.named_buffers(remove_duplicate=False)}

    def save(self, path: str | Path) -> Path:
        """Write the program, graph and tensors, to one safetensors file; see `Program.load`."""
        from graphtune.serialize import save_program

        return save_program(self, path)

    @staticmethod
    def load(path: str | Path, *, device: torch.device | str | None = None) -> Program:
        """Read a program that `save` wrote.

        Args:
            device: where its tensors go; None is torch's default device.

        Raises:
            UserError: no such file, or it is not a program.
        """
        from graphtune.serialize import load_program

        return load_program(path, device=device)

    def tree(self) -> str:
        """The module tree, identical layers folded, with badges for what each pass did."""
        from graphtune.inspect import tree

        return tree(self)

    def diff(self, other: Program) -> str:
        """How this graph differs from another one of the same capture."""
        from graphtune.inspect import diff

        return diff(other, self)

    def memory(
        self,
        batch: int,
        seq: int,
        *,
        optimizer: Callable[[list[nn.Parameter]], Any] | None = None,
    ) -> MemoryEstimate:
        """What a training step on `batch` rows of `seq` tokens takes; nothing is run or loaded.

        Args:
            batch, seq: the batch's shape.
            optimizer: called with the list of parameters that train; by default AdamW.
        """
        from graphtune.inspect.memory import estimate

        return estimate(self, batch, seq, optimizer=optimizer)

    def __repr__(self) -> str:
        total = sum(p.numel() for p in self.parameters())
        trainable = sum(p.numel() for p in self.trainable_parameters())
        passes = " → ".join(["capture", *(row.name for row in self.ledger)])
        return (
            f"Program({self.info.model_class}: {passes}; {len(self.graph.nodes):,} nodes, "
            f"{total:,} parameters, {trainable:,} trainable)"
        )
