"""EleutherAI's evaluation harness on a program: tasks such as hellaswag, by the harness's own code.

Only what asks the model is here; data, prompts and metrics are those of `lm_eval`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graphtune.config import did_you_mean
from graphtune.errors import UserError
from graphtune.generation import Sampling, generate, stop_ids
from graphtune.program import Program
from graphtune.recipes.generate import cached, load_speaker

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        normalize_gen_kwargs,
        postprocess_generated_text,
        resolve_max_length,
    )
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(
        f"--tasks needs lm_eval ({error}): pip install 'graphtune[evaluation]'"
    ) from error

T = TypeVar("T")
_MAX_GEN_TOKS = 256  # of an answer, where a task does not say
_MAX_LENGTH = 2048  # of a model that does not say how many positions it has
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def evaluate_tasks(
    target: str,
    tasks: Sequence[str],
    *,
    base: bool = False,
    chat: bool = False,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """Run tasks of the harness on a run, a model or a program.

    Args:
        target, base: see `load_speaker`.
        tasks: names of tasks, groups or tags; `*` stands for any characters.
        chat: put the prompts into the model's chat template, each example a turn.
        fewshot: examples before each question; None: as the task says.
        limit: questions of each task; None: all.
        batch_size: texts that the model reads at once.
        include_path: a folder with tasks of one's own, as YAML files.

    Returns:
        What `lm_eval.simple_evaluate` returns: `results` by task and metric, and what they were
        measured with.

    Raises:
        UserError: there is no such task, target or chat template.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager, names = find_tasks(tasks, include_path)
    program, tokenizer = load_speaker(target, base=base)
    if chat and not tokenizer.chat_template:
        raise UserError(f"--chat: the tokenizer of {target} has no chat template; leave it out")
    found = simple_evaluate(
        ProgramLM(program, tokenizer, batch_size),
        tasks=names,
        num_fewshot=fewshot,
        limit=limit,
        batch_size=batch_size,
        apply_chat_template=chat,
        task_manager=manager,
        log_samples=False,
    )
    found["config"] |= {"model": target, "base": base, "chat": chat}
    return found


def find_tasks(tasks: Sequence[str], include_path: Path | None) -> tuple[TaskManager, list[str]]:
    """The harness's index of tasks, and the names in it that were asked for.

    Raises:
        UserError: a name matches none.
    """
    if include_path is not None:
        if not include_path.is_dir():
            raise UserError(f"--include-path={include_path}: there is no such folder")
        # Its own thousands of files take long to read, and tasks of a folder need none of them.
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own, list(tasks)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if not manager.match_tasks([name]):
            raise UserError(
                f"--tasks={name}: there is no such task{did_you_mean(name, manager.all_tasks)}"
            )
    return manager, manager.match_tasks(list(tasks))


class ProgramLM(TemplateLM):
    """A program as the harness asks models: how likely texts are, and how they go on.

    Answers are those of its `HFLM` with transformers' model, whose conventions these are: where a
    text is cut if it is too long, which token stands before the first, what ends an answer. The
    end of a turn in the chat template ends one too.

    Args:
        program: gives logits of all tokens.
        tokenizer: of its model.
        batch_size: texts that are read at once.
    """

    def __init__(
        self, program: Program, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8
    ) -> None:
        super().__init__()
        if not program.takes_mask or "rows" in program.inputs:
            raise UserError("tasks need a program that gives the logits of all tokens")
        self.program = program.eval()
        self.tokenizer: Any = tokenizer
        self.batch_size = batch_size
        self.max_length: int = resolve_max_length(program.config, tokenizer, default=_MAX_LENGTH)
        self._device = next(program.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:
            begun = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = not begun
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except TemplateError:  # of a model that knows no system message
            return render([one for one in chat_history if one["role"] != "system"])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        # Answers of one token each to one question are read off the same logits.
        askers: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_text, context, answer) in enumerate(requests):
            read = (context + answer)[-(self.max_length + 1) : -1]
            askers[tuple(read)].append(index)
        found: dict[int, tuple[float, bool]] = {}
        for batch in _batches(sorted(askers, key=len, reverse=True), self.batch_size):
            for ids, logits in zip(batch, self._logits(batch), strict=True):
                for index in askers[ids]:
                    text, _context, answer = requests[index]
                    found[index] = _likelihood(logits[len(ids) - len(answer) : len(ids)], answer)
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, found[index])
        return [found[index] for index in range(len(requests))]

    @torch.no_grad()
    def _logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Of each position, (texts, longest, vocab); causal, so that padding behind is unseen."""
        longest = max(map(len, texts))
        ids = [[*one, *[0] * (longest - len(one))] for one in texts]
        return self.program(torch.tensor(ids, device=self._device))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        windows = [
            (index, (None, *make_disjoint_window(window)))
            for index, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens([window for _, window in windows])
        for (index, _), (likelihood, _) in zip(windows, found, strict=True):
            totals[index] += likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = defaultdict(list)  # those of the same options
        for index, request in enumerate(requests):
            groups[repr(request.args[1])].append(index)
        work = []
        for indices in groups.values():
            options = normalize_gen_kwargs(requests[indices[0]].args[1], _MAX_GEN_TOKS)
            sampling, room = _sampling(options), self.max_length - options["max_gen_toks"]
            if room < 1:
                raise UserError(
                    f"a task asks for answers of {options['max_gen_toks']} tokens, which with a "
                    f"prompt are more than the {self.max_length} positions of the model"
                )
            prompts = {index: self.tok_encode(requests[index].args[0])[-room:] for index in indices}
            work.append((prompts, options, sampling))
        longest = max(
            max(map(len, prompts.values())) + options["max_gen_toks"]
            for prompts, options, _ in work
        )
        speaker = self._speaker(longest, min(self.batch_size, len(requests)))
        answers: dict[int, str] = {}
        for one in work:
            answers |= self._answers(speaker, *one)
        return [answers[index] for index in range(len(requests))]

    def _speaker(self, tokens: int, rows: int) -> Program:
        """The program with a cache for texts so long, where its model can have one."""
        try:
            return cached(self.program, tokens, rows)
        except UserError as error:
            if "without a cache" not in str(error):
                raise
            return self.program

    def _answers(
        self,
        speaker: Program,
        prompts: Mapping[int, list[int]],
        options: Mapping[str, Any],
        sampling: Sampling,
    ) -> dict[int, str]:
        """What follows each prompt; all with the same options, of the harness."""
        stops = handle_stop_sequences(
            list(options["until"]), self.tokenizer.decode(self.eot_token_id)
        )
        ends = stop_ids(self.program, self.tokenizer) | self._single(stops)
        answers = {}
        for batch in _batches(sorted(prompts, key=lambda i: -len(prompts[i])), self.batch_size):
            said: list[list[int]] = [[] for _ in batch]
            for token in generate(
                speaker,
                [prompts[index] or [self.prefix_token_id] for index in batch],
                stop_ids=ends,
                stop_strings=[one for one in stops if one],
                max_new_tokens=options["max_gen_toks"],
                sampling=sampling,
                tokenizer=self.tokenizer,
            ):
                if token.id is not None:
                    said[token.row].append(token.id)
            for index, ids in zip(batch, said, strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                answers[index] = postprocess_generated_text(text, stops, None)
        return answers

    def _single(self, stops: Iterable[str]) -> set[int]:
        """Special tokens among texts that end an answer, which the text of an answer leaves out."""
        special = self.tokenizer.all_special_ids
        found = (self.tokenizer.encode(one, add_special_tokens=False) for one in stops)
        return {ids[0] for ids in found if len(ids) == 1 and ids[0] in special}


def _likelihood(logits: Tensor, answer: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of an answer in nats, and whether each of its tokens is the likeliest.

    Args:
        logits: (tokens, vocab), from which the answer's tokens are chosen.
    """
    chosen = torch.tensor(answer, device=logits.device)
    each = torch.log_softmax(logits.float(), -1).gather(-1, chosen[:, None])
    return each.sum().item(), bool((logits.argmax(-1) == chosen).all())


def _sampling(options: Mapping[str, Any]) -> Sampling:
    known = {"until", "max_gen_toks", "do_sample", *_SAMPLING}
    for name in options:
        if name not in known:
            raise UserError(
                f"a task asks for generation with {name}={options[name]}, which is not supported"
            )
    if not options.get("do_sample"):
        return Sampling(repetition_penalty=options.get("repetition_penalty", 1.0))
    return Sampling(**{name: options[name] for name in _SAMPLING if name in options})


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
