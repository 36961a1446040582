"""Which operators run, within opaque operators and compiled code too."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile


@contextmanager
def counting(*names: str) -> Iterator[dict[str, list[list[int]]]]:
    """Within it operators' calls are counted; what it gives then has each one's first shape.

    Args:
        names: such as `aten::mm`.
    """
    shapes: dict[str, list[list[int]]] = {name: [] for name in names}
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        yield shapes
    for event in found.events():
        if event.name in shapes:
            shapes[event.name].append(event.input_shapes[0])
