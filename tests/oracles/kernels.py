"""Which operators run, within opaque operators and compiled code too."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile


@contextmanager
def counting(name: str) -> Iterator[list[list[int]]]:
    """Within it an operator's calls are counted; what it gives then has each one's first shape.

    Args:
        name: such as `aten::mm`.
    """
    shapes: list[list[int]] = []
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        yield shapes
    shapes += [event.input_shapes[0] for event in found.events() if event.name == name]
