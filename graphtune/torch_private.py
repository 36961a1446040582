"""Every private torch API that graphtune needs, one function each, with its reason.

`tests/test_torch_private.py` fails clearly when torch moves one of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._C._distributed_c10d import _resolve_process_group
from torch._dynamo.decorators import maybe_mark_dynamic
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._higher_order_ops.wrap import wrap_with_set_grad_enabled as _wrap_with_set_grad_enabled
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.distributed_c10d import GroupName
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode

TensorMode = TorchDispatchMode
"""A mode that is called for each operator on tensors: how to count those that live."""


def is_grad_mode_block(node: fx.Node) -> bool:
    """Whether `node` runs a subgraph under a fixed gradient mode.

    `torch.export` wraps `with torch.no_grad():` regions in a higher-order op that Dynamo
    refuses when shapes are dynamic, so capture inlines them; the op has no public name.
    """
    return node.op == "call_function" and node.target is _wrap_with_set_grad_enabled


def is_fake(value: Any) -> bool:
    """Whether `value` is the shape-only tensor that `torch.export` leaves in `meta["val"]`."""
    return isinstance(value, FakeTensor)


def fake_parameter(like: FakeTensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A shape-only tensor in the same fake world, and on the same device, as `like`.

    The mode in which `torch.export` traced is reachable only through its tensors; new nodes
    must be propagated in it, or their symbolic sizes would be other symbols.
    """
    with like.fake_mode:
        return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def fake_tensors() -> AbstractContextManager[Any]:
    """Within it, tensors that are made have shapes and devices but no memory.

    The only mode in which a whole training step can run on shapes: on the meta device autograd
    and operators forget what device they are for, and some refuse.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def propagate(like: FakeTensor, target: Any, args: tuple, kwargs: dict) -> Any:
    """The shape-only result of `target(*args, **kwargs)` in the fake world of `like`."""
    with like.fake_mode:
        return target(*args, **kwargs)


def symbolic_inputs(
    device: torch.device, batch: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Shape-only inputs of a program, whose batch and sequence are symbols.

    `torch.export` makes such symbols while it traces; a graph that is read from a file needs them
    without a trace, and a `ShapeEnv` has no public way to make one.

    Args:
        device: of the inputs.
        batch: a number, where the batch is to be one instead.

    Returns:
        ids (batch, seq) int64, mask (batch, 1, seq, seq) bool, positions (batch, seq) int64.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    rows = DimDynamic.DYNAMIC if batch is None else DimDynamic.STATIC
    free = StatelessSymbolicContext(dynamic_sizes=[rows, DimDynamic.DYNAMIC])
    example = torch.zeros(batch or 3, 11, dtype=torch.int64, device=device)
    ids = mode.from_tensor(example, symbolic_context=free)
    size, seq = ids.shape
    with mode:
        mask = torch.empty(size, 1, seq, seq, dtype=torch.bool, device=device)
        return ids, mask, torch.empty_like(ids)


def symbolic_input(
    like: FakeTensor, shape: Sequence[int | None], dtype: torch.dtype = torch.int64
) -> Tensor:
    """A shape-only tensor in the fake world of `like`, with a symbol of its own for each None."""
    kinds = [DimDynamic.DYNAMIC if size is None else DimDynamic.STATIC for size in shape]
    free = StatelessSymbolicContext(dynamic_sizes=kinds)
    sizes = [7 if size is None else size for size in shape]
    example = torch.zeros(sizes, dtype=dtype, device=like.device)
    return like.fake_mode.from_tensor(example, symbolic_context=free)


def trace(function: Callable[..., Any], inputs: Sequence[FakeTensor]) -> fx.Graph:
    """The operators that a function of tensors runs, those of gradients that it asks for included.

    `torch.export` traces modules, and leaves gradients to autograd.
    """
    return make_fx(function, tracing_mode="symbolic")(*inputs).graph


def salted_cache(salt: str) -> AbstractContextManager:
    """Within it, `torch.compile` uses the entries of its on-disk caches that have this salt.

    The caches' keys leave out what passes write into a graph's metadata. The setting itself,
    `torch.compiler.config.cache_key_tag`, is public; changing it for a while is not.
    """
    return torch.compiler.config.patch(cache_key_tag=salt)  # type: ignore[attr-defined]


class _PostGradPass(CustomGraphPass):
    def __init__(self, rewrite: Callable[[fx.Graph], None], name: str) -> None:
        self.rewrite, self.name = rewrite, name

    def __call__(self, graph: fx.Graph) -> None:
        self.rewrite(graph)

    def uuid(self) -> str:
        return self.name


def with_post_grad_pass(rewrite: Callable[[fx.Graph], None], name: str) -> dict[str, Any]:
    """Inductor's options for a rewrite of the forward and of the backward graph.

    Before autograd has made them, products of gradients are nowhere to be seen.

    Args:
        name: what the caches know it by; another one for another rewrite.
    """
    return {"post_grad_custom_post_pass": _PostGradPass(rewrite, name)}


def linear_by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """(m, k) times (k, n), float32 on a CPU, by oneDNN; torch offers it for constants alone."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return result


def vary(tensor: Tensor, dims: Sequence[int]) -> None:
    """Tell `torch.compile` that these sizes of a tensor vary, so that one graph serves them all.

    Its public `dynamic=True` makes symbols of widths too, and `mark_dynamic` refuses a size of 1.
    """
    marked: Any = tensor
    if not hasattr(marked, "_dynamo_weak_dynamic_indices"):  # the call is not free
        maybe_mark_dynamic(tensor, dims)


def compiled_graphs() -> int:
    """How many graphs `torch.compile` has made in this process; the only counter that there is."""
    return int(counters["stats"]["unique_graphs"])


def memory_budget(budget: float) -> AbstractContextManager:
    """Within it, the partitioner of a step that is compiled keeps this share of activations.

    The public `torch.autograd.graph.region_activation_memory_budget` is a prototype, and works
    only within what is compiled; what a tag on a node says of it does not survive.
    """
    return functorch_config.patch(activation_memory_budget=budget)


def size_symbol(size: int | torch.SymInt) -> str | None:
    """The name of the symbol that a traced size is, or None for a constant or an expression."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
        return str(size.node.expr)
    return None


def size_expression(size: int | torch.SymInt) -> Any:
    """A traced size as what can be compared and hashed without a guard."""
    return size if isinstance(size, int) else size.node.expr


def size_at(size: int | torch.SymInt, symbols: dict[str, int]) -> int:
    """The value of a traced size when its symbols have the given values."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if expression.is_Symbol:  # most are, and to substitute takes long
        return symbols[str(expression)]
    return int(expression.subs({s: symbols[str(s)] for s in expression.free_symbols}))


def causal_attention_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention by the fused kernel, and the logsumexp of its scores.

    The public `scaled_dot_product_attention` keeps the logsumexp to itself, without which an
    operator of our own could not call the kernel of the backward pass.
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return forward(query, key, value, 0.0, True, scale=scale)


def causal_attention_on_cpu_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, of what `causal_attention_on_cpu` returned; as above."""
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    return backward(gradient, query, key, value, out, logsumexp, 0.0, True, scale=scale)


def compile_package(program: ExportedProgram, path: Path) -> None:
    """Compile an exported program ahead of time, to a package for the device that it is on.

    AOTInductor's documented entry points are in a module with a private name.
    """
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def load_package(path: Path) -> Callable[..., Any]:
    """Load what `compile_package` wrote; it takes and gives what the program does."""
    return torch._inductor.aoti_load_package(str(path))


def group_size(group: str) -> int:
    """How many ranks a process group has, by the name that graphs hold.

    A graph's arguments are plain values, and only torch's own collectives look names up.
    """
    return _resolve_process_group(GroupName(group)).size()


def group_rank(group: str) -> int:
    """Which of the ranks of a process group this one is, by the group's name; as above."""
    return _resolve_process_group(GroupName(group)).rank()


def start_memory_history(device: torch.device) -> bool:
    """Let a device's allocator keep what is allocated where in the code; whether it can.

    The record and its viewer are documented, but the names of what makes it are private.
    """
    memory = getattr(torch.get_device_module(device), "memory", None)
    record = getattr(memory, "_record_memory_history", None)
    if record is not None:
        record()
    return record is not None


def write_memory_history(device: torch.device, path: Path) -> None:
    """Write what `start_memory_history` began to keep, for https://docs.pytorch.org/memory_viz,
    and keep no more; as above."""
    memory: Any = torch.get_device_module(device).memory
    memory._dump_snapshot(str(path))
    memory._record_memory_history(enabled=None)


@contextmanager
def pretended_processes(ranks: int) -> Iterator[None]:
    """Within it there is a default process group of `ranks`, of which this process is rank 0.

    Its collectives return at once, without a value that means anything. The backend `fake` is
    registered by a module for torch's own tests, which has its store, too.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
