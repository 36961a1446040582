"""What the shell is offered, through the completion that `--install-completion` sets up."""

from pathlib import Path

import pytest

from graphtune.cli import main
from graphtune.cli.completion import config_names


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("quick.yaml", "notes.txt", ".hidden.yaml", "mine/run.yml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


def test_names_and_files() -> None:
    assert config_names("quic") == ["quick.yaml", "quickstart"]
    assert config_names("mine/") == ["mine/run.yml"]
    assert config_names("llama3_1/7") == ["llama3_1/70B"]
    behind = config_names("llama3_1/70B_q")
    assert "llama3_1/70B_qlora" in behind and "llama3_1/70B" not in behind
    assert config_names("nothing/of/that/name") == []
    everything = config_names("")
    assert "mine/" in everything and ".hidden.yaml" not in everything
    assert not any(name.startswith("techniques/") for name in everything)


@pytest.mark.parametrize(
    ("words", "expected"),
    [("graphtune train llama3_1/8B_ql", "llama3_1/8B_qlora"), ("graphtune insp", "inspect")],
)
def test_the_shell_asks(
    words: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_GRAPHTUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit):
        main([])
    assert expected in capsys.readouterr().out.split()
