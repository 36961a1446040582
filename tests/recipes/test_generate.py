"""`graphtune generate`: prompts, batches from a file, chat, and what it says of its speed."""

import io
import json

import pytest

from graphtune.cli import main


def graphtune(*argv):
    try:
        main([str(word) for word in argv])
    except SystemExit as end:
        return end.code or 0
    return 0


SHORT = ("--max-new-tokens", 6)


def test_prompts_batches_and_chat_say_the_same(model_folder, tmp_path, capsys, monkeypatch):
    questions = ["What is 1 and 2?", "hello there, you"]
    alone = []
    for question in questions:
        assert graphtune("generate", model_folder, question, *SHORT) == 0
        said = capsys.readouterr()
        alone.append(said.out.removesuffix("\n"))
        assert "tokens/s" in said.err and "GB/s" in said.err

    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": questions[1]}]
    file.write_text(
        json.dumps({"prompt": questions[0]}) + "\n" + json.dumps({"messages": messages})
    )
    options = ("--file", file, "--batch-size", 2, "--json")
    for more in ([], ["--no-cache"]):
        assert graphtune("generate", model_folder, *options, *SHORT, *more) == 0
        found = json.loads(capsys.readouterr().out)
        assert [one["answer"] for one in found["answers"]] == alone
        speed = found["speed"]
        assert speed["of_floor"] == pytest.approx(speed["steps_per_s"] / speed["floor_steps_per_s"])

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{questions[0]}\n/new\n{questions[1]}\n"))
    assert graphtune("generate", model_folder, "--chat", "--length", 128, *SHORT) == 0
    assert capsys.readouterr().out == "".join(text + "\n" for text in alone)


def test_refusals(model_folder, tmp_path, capsys):
    cases = [
        (["--chat", "hello"], "not both"),
        ([], "give prompts"),
        (["hello", "--merge"], "--merge is for a training run"),
        (["hello", "--length", 8], "more than the cache's 64 positions"),
        (["hello", "--top-k", 5], "above 0 for top_k"),
        (["--file", tmp_path / "none.jsonl"], "no such file"),
    ]
    for options, message in cases:
        assert graphtune("generate", model_folder, *options) == 2
        assert message in capsys.readouterr().err
