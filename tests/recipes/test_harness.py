"""Tasks of lm_eval on programs; the oracle is its own adapter for transformers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import graphtune as gt
from graphtune.errors import UserError
from graphtune.models import load_tokenizer
from tests.oracles.command_line import graphtune

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from graphtune.recipes.harness import ProgramLM, find_tasks  # noqa: E402

TASKS = ["sums_choice", "sums_answer"]
QUESTIONS = [
    {
        "question": f"What is {a} and {b}?",
        "choices": ["Both.", str(a + b), "none of these"],
        "gold": int(a == 3),
    }
    for a in range(4)
    for b in range(3)
]


@pytest.fixture(autouse=True)
def no_look_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks other programs what machine it runs on, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of our own: choose the likeliest of some answers, and write one."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    shared: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    choice = shared | {
        "task": TASKS[0],
        "output_type": "multiple_choice",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    answer = shared | {
        "task": TASKS[1],
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n", " e"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choice, answer):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def both(model_folder: Path) -> tuple[ProgramLM, HFLM]:
    tokenizer = load_tokenizer(model_folder)
    ours = ProgramLM(gt.capture(gt.load_model(model_folder)), tokenizer, batch_size=4)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    theirs = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(model_folder), batch_size=4)
    return ours, theirs


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


LONG = " ".join(f"{word} and more" for word in range(60))  # does not fit into 128 positions


def test_texts_are_as_likely_as_with_transformers(both: tuple[ProgramLM, HFLM]) -> None:
    ours, theirs = both
    texts = [
        ("What is 1 and 2?", " Both."),
        ("What is 1 and 2? ", "x"),  # the space belongs to the answer
        ("", "Both."),
        ("What is 1 and 2?", " 3"),
        ("What is 1 and 2?", " 4"),
        (LONG, " Both."),
        ("a", "b"),
    ]
    asked = requests("loglikelihood", *texts)
    found, expected = (one.loglikelihood(asked, disable_tqdm=True) for one in both)
    for (value, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-4)
        assert greedy == wanted_greedy
    asked = requests("loglikelihood_rolling", ("What is 1 and 2?",), (LONG,), ("",))[:2]
    assert len(ours.tok_encode(LONG)) > ours.max_length == theirs.max_length
    found, expected = (one.loglikelihood_rolling(asked, disable_tqdm=True) for one in both)
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_greedy_answer_is_known_as_such(both: tuple[ProgramLM, HFLM]) -> None:
    ours, _ = both
    prompt = ours.tok_encode("What is 1 and 2?")
    likeliest = ours._logits([prompt])[0, -1].argmax().item()
    ((value, greedy), (other, is_not)) = ours._loglikelihood_tokens(
        [(None, prompt, [likeliest]), (None, prompt, [likeliest - 1])]
    )
    assert greedy and not is_not and value > other


def test_answers_are_those_of_transformers(both: tuple[ProgramLM, HFLM]) -> None:
    ours, _ = both
    prompts = ["What is 1 and 2?", "hello there, you", LONG, "the\nother"]
    plain: dict[str, Any] = {"until": ["\n\n"], "max_gen_toks": 12}
    # Ended by a special token, and by a text that the first answer has in its middle.
    special = ours.tokenizer.convert_ids_to_tokens(ours.eot_token_id)
    asked = requests("generate_until", *((one, plain) for one in prompts))
    expected = both[1].generate_until(asked, disable_tqdm=True)
    stop = expected[0][3:5]
    ended: dict[str, Any] = {"until": [stop, special], "max_gen_toks": 9, "do_sample": False}
    asked += requests("generate_until", *((one, ended) for one in prompts))
    found, expected = (one.generate_until(asked, disable_tqdm=True) for one in both)
    assert found == expected and all(found[:4])
    assert len(found[4]) < len(found[0])


def evaluated(capsys: Any, *words: object) -> dict[str, Any]:
    """What `graphtune evaluate ... --json` says."""
    assert graphtune("evaluate", *words, "--json") == 0, capsys.readouterr().err
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def expected_of(model: Any, model_folder: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """What the harness makes of transformers' model."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    manager, _ = find_tasks(TASKS, folder)
    found = simple_evaluate(
        HFLM(model, tokenizer=tokenizer, batch_size=8),
        task_manager=manager,
        log_samples=False,
        **options,
    )
    assert found is not None
    return dict(found["results"])


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_results_are_those_of_transformers(
    folder: Path, model_folder: Path, tmp_path: Path, capsys: Any, chat: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    options: dict[str, Any] = {"num_fewshot": 2, "limit": 8, "apply_chat_template": chat}
    expected = expected_of(model, model_folder, folder, tasks=TASKS, **options)
    words = ["--tasks", ",".join(TASKS), "--include-path", folder, "--fewshot", 2, "--limit", 8]
    words += ["--chat"] if chat else []
    saved = tmp_path / "found.json"
    results = evaluated(capsys, model_folder, *words, "-o", saved)
    assert results.keys() == set(TASKS)
    for task in TASKS:
        assert results[task] == pytest.approx(expected[task])
    told = json.loads(saved.read_text())
    assert told["results"] == results and told["n-shot"] == {task: 2 for task in TASKS}


@pytest.mark.usefixtures("quick")
def test_a_run_before_and_after_training(
    config: dict[str, Any],
    write: Any,
    folder: Path,
    model_folder: Path,
    capsys: Any,
    tmp_path: Path,
) -> None:
    """What was trained is measured; the oracle is transformers with what was saved."""
    config["passes"] = {"full": {}}
    assert graphtune("train", write(config), "optimizer.lr=0.1") == 0
    run = Path(config["output_dir"])
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    words = ["--tasks", TASKS[0], "--include-path", folder, "--chat"]
    options: dict[str, Any] = {"tasks": TASKS[:1], "apply_chat_template": True}
    before = expected_of(base, model_folder, folder, **options)
    assert evaluated(capsys, run, *words, "--base")[TASKS[0]] == pytest.approx(before[TASKS[0]])
    tuned = AutoModelForCausalLM.from_pretrained(run / "model")
    after = expected_of(tuned, model_folder, folder, **options)
    assert after != before, "nothing was learned that the task could tell"
    assert graphtune("evaluate", run, *words, "-o", tmp_path / "all.json") == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[-3:]] == ["task", TASKS[0], TASKS[0]]
    results = json.loads((tmp_path / "all.json").read_text())["results"]
    assert results[TASKS[0]] == pytest.approx(after[TASKS[0]])
    assert f"{after[TASKS[0]]['acc,none']:.4f}" in table[-2]


def test_an_unknown_task_names_near_ones(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    class Own(TaskManager):  # the harness's own thousands of tasks take long to read
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "include_defaults": False})

    monkeypatch.setattr("graphtune.recipes.harness.TaskManager", Own)
    with pytest.raises(UserError, match="--tasks=sums_choise.*sums_choice"):
        find_tasks(["sums_choise"], folder)
    assert find_tasks(["sums_*"], folder)[1] == sorted(TASKS)


def test_the_harness_is_optional(model_folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "graphtune.recipes.harness")
    assert graphtune("evaluate", model_folder, "--tasks", "hellaswag") == 2
    assert "pip install 'graphtune[evaluation]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "sums_choice", "max_steps=3"], "max_steps=3: with --tasks there is no config"),
        (["--chat"], "--chat is for tasks"),
        (["--tasks", ","], "name at least one"),
        (["--tasks", "a", "--include-path", "/nowhere"], "--include-path=/nowhere"),
        (["--tasks", "a", "-o", "/nowhere/out.json"], "no such folder"),
        (
            ["--tasks", "sums_choice", "--include-path", "{folder}", "--base"],
            "--base is for a training",
        ),
    ],
)
def test_refusals(folder: Path, model_folder: Path, capsys, words: list[str], said: str) -> None:
    given = (word.format(folder=folder) for word in words)
    assert graphtune("evaluate", model_folder, *given) == 2
    assert said in capsys.readouterr().err
