"""Running a program for one batch of answers: with a key-value cache, or on the whole each time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from graphtune.cpu_matmul import matmul_options
from graphtune.errors import UserError
from graphtune.passes.kv_cache import cache_of
from graphtune.program import Program


class Decoder(Protocol):
    """What `generate` asks for logits. It runs the program as it is, dropout off or not."""

    program: Program

    def start(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        """Read the prompts of a batch.

        Args:
            prompts: ids of each row, of any lengths, none empty.
            room: how many tokens may follow each.

        Returns:
            The logits of what comes next, (rows, vocab).

        Raises:
            UserError: prompts and answers are too long or too many.
        """

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token of each row; returns the next logits, (rows, vocab)."""


def decoder_of(program: Program, *, compile: bool = False) -> Decoder:
    """A decoder for a program, with or without a cache."""
    if program.takes_mask:
        return WholeDecoder(program)
    return CachedDecoder(program, compile=compile)


class CachedDecoder:
    """Decodes with a program that `KVCache` made; one batch at a time.

    Args:
        program: its cache has room for at least as many rows as there will be prompts.
        compile: run it through `torch.compile`: once for single tokens, once for prompts of any
            length.
    """

    def __init__(self, program: Program, *, compile: bool = False) -> None:
        options = cache_of(program)
        if options is None:
            raise UserError("the program has no key-value cache; apply KVCache(length=...)")
        self.program, self.options = program, options
        self.run: Any = program.graph_module
        self.device = next(program.parameters()).device
        if compile:
            on_cpu = self.device.type == "cpu"
            graph_module = _with_fused_rows(program) if on_cpu else program.graph_module
            self.run = torch.compile(graph_module, fullgraph=True, options=matmul_options())
        self.rows = 0

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        longest = max(map(len, prompts))
        length, batch = self.options.length, self.options.batch
        if len(prompts) > batch:
            raise UserError(f"{len(prompts)} prompts do not fit into a cache of batch={batch}")
        if longest + room > length:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={room} are more than the cache's "
                f"{length} positions; give it a larger length"
            )
        self.rows = len(prompts)
        given = [*prompts, *([prompts[0]] * (batch - self.rows))]
        # Padding lies on the left, so that all rows end, and go on, together.
        ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in given])
        starts = torch.tensor([[len(one) - longest] for one in given])
        positions = torch.arange(longest) + starts
        part = self.options.prefill or length
        for begin in range(0, longest, part):
            logits = self._read(*(x[:, begin : begin + part] for x in (ids, positions)))
        self.positions = positions[:, -1:]
        return logits

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        self.positions = self.positions + 1
        given = [*tokens, *([tokens[0]] * (self.options.batch - self.rows))]
        return self._read(torch.tensor(given)[:, None], self.positions)

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        ids, positions = ids.contiguous().to(self.device), positions.contiguous().to(self.device)
        if ids.shape[1] > 1:  # so that the first prompt is compiled for all lengths
            for one in (ids, positions):
                torch._dynamo.maybe_mark_dynamic(one, 1)
        return self.run(ids, positions)[: self.rows, -1]


def _with_fused_rows(program: Program) -> fx.GraphModule:
    """The graph of a program, its linears in the form of which inductor makes the fastest loop."""
    graph = copy.deepcopy(program.graph)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        node.target = _linear
    return fx.GraphModule(program, graph)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear that, of a single row, is written as a sum of products.

    Such a product takes as long as its weight takes to be read. As a loop of inductor's it reads a
    weight at twice the speed of a CPU library's product of matrices, and a quantized one as it is
    stored, without writing down what it stands for.
    """
    if x.numel() != x.shape[-1]:
        return torch.nn.functional.linear(x, weight, bias)
    out = (x.unsqueeze(-2) * weight).sum(-1)
    return out if bias is None else out + bias


class WholeDecoder:
    """Decodes with a program as it was captured: the whole text is run again for each token."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.device = next(program.parameters()).device
        self.texts: list[list[int]] = []

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        longest = max(map(len, prompts))
        positions = getattr(self.program.config, "max_position_embeddings", None)
        if positions is not None and longest + room > positions:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={room} are more than the model's "
                f"{positions} positions"
            )
        self.texts = [list(one) for one in prompts]
        return self._read()

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        for text, token in zip(self.texts, tokens, strict=True):
            text.append(token)
        return self._read()

    def _read(self) -> Tensor:
        longest = max(map(len, self.texts))
        padding = [longest - len(one) for one in self.texts]
        ids = [[0] * pad + one for pad, one in zip(padding, self.texts, strict=True)]
        given = torch.tensor(ids, device=self.device)
        if not any(padding):
            return self.program(given)[:, -1]
        real = torch.tensor([[0] * p + [1] * (longest - p) for p in padding], device=self.device)
        return self.program(given, real)[:, -1]
