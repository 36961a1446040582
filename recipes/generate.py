"""Generation: answer prompts with a program, one token after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase

from graphtune.data import ConversationEncoder
from graphtune.errors import UserError
from graphtune.program import Program


def encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None) -> list[int]:
    """The ids of a prompt in the model's chat template; of the bare text if it has none."""
    if not tokenizer.chat_template:
        return tokenizer.encode(f"{system}\n\n{prompt}" if system else prompt)
    messages = [{"role": "user", "content": prompt}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return list(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


def stop_ids(program: Program, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer: the tokenizer's end of sequence, what the config adds, and what
    the chat template writes after the assistant's words (Llama 3's `<|eot_id|>`, say)."""
    configured = getattr(program.config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    ends = {i for i in (tokenizer.eos_token_id, *configured) if i is not None}
    return ends | _end_of_turn(tokenizer)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special token that ends a turn; none without a template, or if a turn ends in text."""
    if not tokenizer.chat_template:
        return set()
    try:
        written = ConversationEncoder(tokenizer).renderer.end_of_turn
    except UserError:  # a template that takes other conversations than a question and an answer
        return set()
    ids = tokenizer.encode(written.rstrip(), add_special_tokens=False)
    return {i for i in ids[-1:] if i in tokenizer.added_tokens_decoder}


@torch.no_grad()
def generate(
    program: Program,
    ids: list[int],
    *,
    stop: set[int],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the ids of an answer as they are drawn; the stop id is not among them.

    The whole sequence is run again for each token: there is no key-value cache.

    Args:
        program: dropout is off while it runs.
        ids: of the prompt.
        stop: ids that end the answer.
        max_new_tokens: most ids that are drawn.
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is
            drawn.
        seed: of the drawing.

    Raises:
        UserError: prompt and answer do not fit into the model's positions.
    """
    positions = getattr(program.config, "max_position_embeddings", None)
    if positions is not None and len(ids) + max_new_tokens > positions:
        raise UserError(
            f"a prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} are more than the "
            f"model's {positions} positions"
        )
    was_training = program.training
    program.eval()
    device = next(program.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    sequence = list(ids)
    try:
        for _ in range(max_new_tokens):
            logits = program(torch.tensor([sequence], device=device))[0, -1].float().cpu()
            if temperature > 0:
                weights = torch.softmax(logits / temperature, -1)
                token = int(torch.multinomial(weights, 1, generator=generator))
            else:
                token = int(logits.argmax())
            if token in stop:
                return
            sequence.append(token)
            yield token
    finally:
        program.train(was_training)
