"""Head and loss: in FusedLoss's chunks, against plain logits, torch's chunks, and inductor's.

    python benchmarks/fused_loss.py --batch 4 --length 256

A head of SmolLM2-135M's shape (576 wide, 49,152 tokens) over one small layer, float32, forward and
backward. In `frozen` ways the head does not train, as with LoRA; in `trained` ways it does.
`F.linear_cross_entropy` in chunks is not compiled: torch.compile leaves it to eager mode.
"""

from collections.abc import Callable

from steps import compare

WAYS = ("logits", "ours", "torch_chunks", "auto_chunker")
CONTENDERS = tuple(f"{way}_{head}" for head in ("frozen", "trained") for way in WAYS)


def make_step(contender: str, batch: dict) -> Callable[[], float]:
    import torch
    import torch._inductor.config as inductor
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    import graphtune as gt
    from graphtune.losses import cross_entropy, shift_labels
    from graphtune.passes import Full, FusedLoss

    way, _, head = contender.rpartition("_")
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    targets = ["*.q_proj", *(["lm_head"] if head == "trained" else [])]
    program = gt.capture(model).apply(Full(targets=targets))
    if way == "ours":
        program = program.apply(FusedLoss())
    step = gt.compile_step(program, torch.optim.SGD(program.trainable_parameters(), lr=0.0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(program.get_parameter(name).requires_grad)

    def torch_chunks(batch: dict) -> torch.Tensor:
        hidden = model.model(batch["input_ids"], use_cache=False).last_hidden_state
        return F.linear_cross_entropy(
            hidden.flatten(0, 1),
            model.lm_head.weight,
            shift_labels(batch["labels"]).flatten(),
            reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(),
        )

    @torch.compile
    def auto_chunked(batch: dict) -> torch.Tensor:
        logits = program(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
        return cross_entropy(logits, batch["labels"])

    def run() -> float:
        if way == "torch_chunks":
            loss = torch_chunks(batch)
        elif way == "auto_chunker":
            with inductor.patch("auto_chunker.enable", True):
                loss = auto_chunked(batch)
        else:
            loss = step.loss_sum(batch)
        loss.backward()
        for parameter in (*model.parameters(), *program.parameters()):
            parameter.grad = None
        return loss.item()

    return run


if __name__ == "__main__":
    compare(__file__, __doc__ or "", CONTENDERS, "logits_frozen", make_step)
