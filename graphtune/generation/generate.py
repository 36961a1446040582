"""The loop: choose a token for each row, give its text out, and read it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from graphtune.errors import UserError
from graphtune.generation.decoding import Decoder, decoder_of
from graphtune.generation.sampling import Sampler, Sampling
from graphtune.generation.streaming import TextStream
from graphtune.program import Program

End = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Token:
    """A step of one answer.

    Attributes:
        row: which prompt it answers.
        id: what was chosen; None where the answer has ended with an id of `stop_ids`.
        text: what there is to show of the answer now, perhaps nothing yet. An answer's texts add
            up to the text of its ids, but for a stop string and what follows it.
        end: why the answer ends here: `eos`, an id of `stop_ids`; `stop`, a stop string; `length`,
            `max_new_tokens`; None if it goes on.
    """

    row: int
    id: int | None
    text: str
    end: End | None


def generate(
    program: Program | Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Collection[int] = (),
    stop_strings: Sequence[str] = (),
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[Token]:
    """Answer a batch of prompts, token by token as they are chosen.

    Args:
        program: with a key-value cache (`graphtune.passes.KVCache`), or without, which runs the
            whole text again for each token; or a decoder of one. Dropout is off while it runs.
        prompts: ids of each row, of any lengths.
        stop_ids: ids that end an answer.
        stop_strings: texts that end an answer, which needs the tokenizer.
        max_new_tokens: most ids of an answer.
        sampling: how they are chosen; None: the likeliest each time.
        tokenizer: turns ids into text; None leaves texts empty.

    Raises:
        UserError: prompts and answers do not fit into the cache or the model's positions; a
            prompt is empty.
    """
    if any(not prompt for prompt in prompts) or not prompts:
        raise UserError("`prompt`: there is nothing to go on from; write at least one token")
    if stop_strings and tokenizer is None:
        raise UserError("`stop_strings` are looked for in the text, which needs a tokenizer")
    if "" in stop_strings:
        raise UserError("`stop_strings`: an empty text would end every answer at once")
    decoder = decoder_of(program) if isinstance(program, Program) else program
    was_training = decoder.program.training
    decoder.program.eval()
    try:
        yield from _loop(
            decoder,
            [list(prompt) for prompt in prompts],
            Sampler(sampling or Sampling(), len(prompts)),
            [None if tokenizer is None else TextStream(tokenizer, stop_strings) for _ in prompts],
            stop_ids,
            max_new_tokens,
        )
    finally:
        decoder.program.train(was_training)


def _loop(
    decoder: Decoder,
    said: list[list[int]],
    sampler: Sampler,
    texts: Sequence[TextStream | None],
    stop_ids: Collection[int],
    most: int,
) -> Iterator[Token]:
    going = [True] * len(said)
    logits = decoder.start(said, most)
    for count in range(1, most + 1):
        chosen = sampler.choose(logits, said)
        for row, token in enumerate(chosen):
            if going[row]:
                step = _step(row, token, texts[row], token in stop_ids, count == most)
                going[row] = step.end is None
                yield step
            said[row].append(token)
        if not any(going):
            return
        logits = decoder.step(chosen)


def _step(row: int, token: int, text: TextStream | None, stops: bool, is_last: bool) -> Token:
    piece = "" if stops or text is None else text.push(token)
    end: End | None = None
    if stops:
        end = "eos"
    elif text is not None and text.stopped:
        end = "stop"
    elif is_last:
        end = "length"
    if end is not None and text is not None:
        piece += text.finish()
        end = "stop" if text.stopped and end == "length" else end
    return Token(row, None if stops else token, piece, end)
