"""What a run has changed, in words."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

RETENTION_LIMIT = 1.10  # times its perplexity on unrelated text that a model may end with


def print_results(
    results: Mapping[str, Mapping[str, float]], seconds: Mapping[str, float], console: Console
) -> None:
    """Compare what was measured before training and after it, as far as both were.

    Args:
        results: `before` and `after`, each with `heldout_loss` in nats per token and
            `retention_perplexity`, that on text that has nothing to do with what was trained on;
            and `train` with `tokens_per_s`.
        seconds: spent in each phase.
        console: where to.
    """
    before, after = results["before"], results["after"]
    if "heldout_loss" in before and "heldout_loss" in after:
        was, now = before["heldout_loss"], after["heldout_loss"]
        console.print(
            f"held-out loss {was:.4f} → {now:.4f} ({now - was:+.4f} nats per token)",
            highlight=False,
        )
    if "retention_perplexity" in before and "retention_perplexity" in after:
        was, now = before["retention_perplexity"], after["retention_perplexity"]
        kept = now <= RETENTION_LIMIT * was
        verdict = "kept" if kept else "FORGOT: lower the rate, or train less"
        console.print(
            f"unrelated text, perplexity {was:.2f} → {now:.2f} ({now / was - 1:+.1%}; {verdict})",
            highlight=False,
        )
    phases = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    tokens_per_s = results["train"]["tokens_per_s"]
    console.print(f"{phases}; {tokens_per_s:,.0f} tokens/s", highlight=False)
