"""The progress line, in a terminal and elsewhere."""

import io

from rich.console import Console

from graphtune.training.progress import TrainingProgress


def shown(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with TrainingProgress(3, console) as progress:
        for step in (1, 2):
            progress.update(step, loss=2.5, tokens_per_s=1234, memory=3 * 2**30, eta_s=61)
    return out.getvalue()


def test_a_terminal_has_one_live_line_with_the_figures():
    text = shown(True)
    assert "\x1b[" in text  # redrawn in place
    for figure in ("2/3", "loss 2.500", "1,234 tokens/s", "3.0 GiB", "ETA"):
        assert figure in text


def test_elsewhere_each_update_is_a_plain_line():
    assert shown(False).splitlines() == [
        f"step {step}/3  loss 2.500  1,234 tokens/s  3.0 GiB  ETA 1:01" for step in (1, 2)
    ]
