"""What is checked after every pass, and the gate between a program and the model it came from.

All of it is cheap: shapes and gradients are followed on the meta device, where nothing is
computed, and the numerics class costs two forwards of a few tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphtune.losses import with_rows
from graphtune.masks import with_documents
from graphtune.program import Program
from graphtune.shapes import fixed_batch
from graphtune.sites import module_of
from graphtune.torch_private import is_fake, size_at, size_symbol


class VerificationError(RuntimeError):
    """A pass broke the program. The message names the pass, the place and the number."""


def verify(before: Program, after: Program) -> None:
    """Check what the last pass of `after` did to `before`.

    The graph is well formed and its new nodes say where they belong; shapes agree with what the
    nodes carry, for a batch and a length that were not captured; every trainable parameter gets
    a gradient and every frozen one none; the numerics class that the pass claims holds.

    Raises:
        VerificationError: naming the pass, the node or parameter, and the number.
    """
    row = after.ledger[-1]
    _check_graph(after, row.name)
    logits, leaves = _run_on_meta(after, row.name)
    _check_gradients(after, logits, leaves, row.name)
    if row.numerics != "lossy" and after.deferred is None:
        _check_same_output(before, after, row.name, row.numerics)


def verify_claims(claims: Iterable[tuple[str, str, fx.Graph, fx.Graph]], loaded: Program) -> None:
    """Check the numerics claims of passes that were applied before there were weights.

    Args:
        claims: name of a pass, its numerics class, the graph before it, the graph after it.
        loaded: the final program; a claim is left out if it has not all tensors of both graphs
            any more, which a later pass has replaced or made into shards.

    Raises:
        VerificationError: the output is another.
    """
    parameters, buffers = loaded.all_parameters(), loaded.all_buffers()
    for name, numerics, *graphs in claims:
        reads = [node for graph in graphs for node in graph.find_nodes(op="get_attr")]
        if all(_has(loaded, node) for node in reads if node.target != "training"):
            before, after = (Program(g, parameters, buffers, loaded.info) for g in graphs)
            _check_same_output(before, after, name, numerics)


def _has(program: Program, read: fx.Node) -> bool:
    """Whether a program has the tensor that a node reads, in the shape that it reads."""
    owner, _, leaf = read.target.rpartition(".")
    try:
        tensor = getattr(program.get_submodule(owner), leaf)
    except AttributeError:
        return False
    return tensor.shape == read.meta["val"].shape


def _check_graph(program: Program, by: str) -> None:
    program.graph.lint()
    for node in program.graph.nodes:
        if node.op == "call_module":
            raise VerificationError(
                f"{by}: node {node.name} calls a module; passes insert operators"
            )
        if node.op != "output" and "val" not in node.meta:
            raise VerificationError(f"{by}: node {node.name} carries no shape (meta['val'])")


class _OnMeta(fx.Interpreter):
    """Runs a graph on the meta device and compares each result with what its node carries."""

    def __init__(self, program: Program, leaves: Mapping[str, Tensor], sizes: dict[str, int]):
        super().__init__(program.graph_module)
        self.leaves = leaves
        self.sizes = sizes

    def get_attr(self, target: str, args: Any, kwargs: Any) -> Any:
        return self.leaves[target] if target in self.leaves else getattr(self.module, target)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        carried = n.meta.get("val")
        if isinstance(result, Tensor) and is_fake(carried):
            expected = [size_at(size, self.sizes) for size in carried.shape]
            if list(result.shape) != expected or result.dtype != carried.dtype:
                raise VerificationError(
                    f"node {n.name} of {module_of(n)[0] or 'the model'} carries "
                    f"{carried.dtype} {expected} and computes {result.dtype} {list(result.shape)}"
                )
        return result


def _run_on_meta(program: Program, by: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits on the meta device, and the leaf that stands there for each parameter."""
    inputs, sizes = _meta_inputs(program)
    stand_in: dict[int, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    for name, tensor in (*program.all_parameters().items(), *program.named_buffers()):
        if id(tensor) not in stand_in:
            stand_in[id(tensor)] = torch.empty_like(tensor, device="meta").requires_grad_(
                tensor.requires_grad
            )
        leaves[name] = stand_in[id(tensor)]
    try:
        with torch.enable_grad():
            return _OnMeta(program, leaves, sizes).run(*inputs), leaves
    except VerificationError as error:
        raise VerificationError(f"{by}: {error}") from None


def _meta_inputs(program: Program) -> tuple[list[Tensor], dict[str, int]]:
    """Inputs of a batch and a length that were not captured, and what each symbol stands for."""
    names = [size_symbol(size) for value in program.inputs.values() for size in value.shape]
    symbols = dict.fromkeys(name for name in names if name is not None)
    sizes = dict(zip(symbols, (2, 5, 3, 4), strict=False))
    inputs = [
        torch.zeros([size_at(n, sizes) for n in one.shape], dtype=one.dtype, device="meta")
        for one in program.inputs.values()
    ]
    return inputs, sizes


def _check_gradients(
    program: Program, logits: Tensor, leaves: Mapping[str, Tensor], by: str
) -> None:
    if not program.takes_mask:  # its keys and values are kept, for inference
        return
    names = {id(leaves[n]): n for n, p in program.named_parameters() if p.requires_grad}
    trainable = [leaves[name] for name in names.values()]
    if not trainable:
        return
    if not logits.requires_grad:
        raise VerificationError(f"{by}: no trainable parameter reaches the logits")
    with torch.enable_grad():
        gradients = torch.autograd.grad(logits.sum(), trainable, allow_unused=True)
    for leaf, gradient in zip(trainable, gradients, strict=True):
        if gradient is None:
            raise VerificationError(f"{by}: {names[id(leaf)]} is trainable and gets no gradient")


def _check_same_output(before: Program, after: Program, by: str, numerics: str) -> None:
    if before.inputs.keys() != after.inputs.keys():
        return  # it computes something else; the pass itself knows how to compare
    ids = probe_ids(after)
    check_close(eval_output(before, ids), eval_output(after, ids), by, numerics)


def check_close(expected: Tensor, found: Tensor, by: str, numerics: str) -> None:
    """Raise VerificationError if outputs differ by more than a numerics class allows.

    Args:
        by: the pass that claims that they are the same.
        numerics: its class; `rounded` allows what sums in another order differ by.
    """
    if torch.equal(expected, found):
        return
    difference = (expected - found).abs().max().item()
    # Two thirds of the digits: sums in another order lose some, and layers pass that on.
    room = torch.finfo(expected.dtype).eps ** (2 / 3) * expected.abs().max().item()
    if not (numerics == "rounded" and difference <= room):
        raise VerificationError(
            f"{by}: claims the same output as before ({numerics}), yet they differ by "
            f"{difference:.3g}"
        )


def probe_ids(program: Program) -> Tensor:
    """A few token ids that every vocabulary has, on the program's device.

    They are (2, 7), or (batch, 7) of a program that is for one batch size.
    """
    rows = fixed_batch(program.ledger) or 2
    return torch.arange(7 * rows, device=program.device).remainder(14).reshape(rows, 7)


@torch.no_grad()
def eval_output(program: Program, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """What a program makes of some ids without dropout or noise; every token is a label.

    Args:
        position_ids: tell which documents there are; None: each row is one.
    """
    was_training = program.training
    given = {} if position_ids is None else {"position_ids": position_ids}
    try:
        batch = with_documents(program, {"input_ids": ids, "labels": ids, **given})
        batch = with_rows(program, batch)
        return program.eval()(**{name: batch[name] for name in batch if name != "labels"})
    finally:
        program.train(was_training)


@contextmanager
def nudged(model: nn.Module) -> Iterator[None]:
    """Within it weights of norms differ in their last bits, as if sums had another order.

    Where inputs of linears are rounded to integers, such a change takes some to the next one, in
    one layer after the other; how far results then are apart says what two right ways to compute
    them may differ by.
    """
    vectors = [p for p in model.parameters() if p.dim() == 1]
    kept = [p.detach().clone() for p in vectors]
    with torch.no_grad():
        for number, p in enumerate(vectors):
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.mul_(1 + 2 * torch.finfo(p.dtype).eps * noise)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(vectors, kept, strict=True):
                p.copy_(value)
