"""The fastest that a machine's memory allows a program to decode."""

from __future__ import annotations

import time

import torch

from graphtune.program import Program
from graphtune.sites import find_sites

_BYTES = 1 << 28  # more than caches hold


def bytes_per_token(program: Program) -> int:
    """Bytes that one step of decoding must read at least: weights and the cache, once each.

    Of an embedding one row per token is read, which counts nothing, unless its table is an output
    head too. All experts of a mixture count, though a token meets but a few.
    """
    reads = program.graph.find_nodes(op="get_attr")
    tables = {site.weight for site in find_sites(program.graph) if site.kind == "embedding"}
    tensors = program.all_parameters() | {n: b for n, (b, _) in program.all_buffers().items()}
    read = {
        id(tensor): tensor.numel() * tensor.element_size()
        for node in reads
        if node not in tables and (tensor := tensors.get(node.target)) is not None
    }
    return sum(read.values())


def read_bandwidth(device: torch.device, *, repeats: int = 7) -> float:
    """Bytes per second at which a device reads memory: the best of a few sums of 256 MiB.

    Like STREAM (McCalpin 1995), it goes once through an array much larger than the caches; unlike
    its copy it only reads, as decoding does. On a CPU it uses as many threads as torch does.
    """
    array = torch.ones(_BYTES // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        float(array.sum())  # reading the result waits for the device
        best = min(best, time.perf_counter() - start)
    return _BYTES / best
