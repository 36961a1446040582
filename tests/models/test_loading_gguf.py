"""GGUF files read one tensor at a time, against the same files loaded whole."""

import weakref
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

import graphtune as gt
from graphtune.models import load_config, load_model
from graphtune.models.gguf import load_gguf_model
from graphtune.models.streaming import stream_weights
from graphtune.weights import load_weights
from tests.oracles.models import assert_same_tensors

WIDTH, HIDDEN, VOCABULARY = 64, 96, 32
Q4, Q8 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0


def write(path: Path, architecture: str, extra: dict[str, tuple[Tensor, GGMLQuantizationType]]):
    """One layer whose matrices are quantized and whose norms are not; `extra` tensors besides."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_sliding_window(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(97 + i) for i in range(VOCABULARY)])
    writer.add_token_merges([])
    random = torch.Generator().manual_seed(0)
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (32, WIDTH), "attn_v": (32, WIDTH)}
    shapes |= {"attn_output": (WIDTH, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
    shapes |= {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH)}
    tensors = {f"blk.0.{n}": (torch.randn(s, generator=random), Q8) for n, s in shapes.items()}
    norms = ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]
    if architecture == "gemma2":
        norms += ["blk.0.post_attention_norm", "blk.0.post_ffw_norm"]
    for name in norms:
        writer.add_tensor(f"{name}.weight", torch.randn(WIDTH, generator=random).numpy())
    for name, (weight, kind) in (tensors | extra).items():
        data = gguf.quantize(weight.numpy(), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def embedding(seed: int = 1) -> Tensor:
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(seed))


def assert_streams_what_loads(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:  # loading it whole would be no stream
        patch.setattr("graphtune.models.streaming.load_gguf_model", None)
        found = dict(stream_weights(path, load_config(path), dtype=dtype))
    expected = dict(load_gguf_model(path, dtype).state_dict())
    if "lm_head.weight" not in found:  # tied
        del expected["lm_head.weight"]
    assert_same_tensors(found, expected)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_tensors_are_those_of_the_whole_model(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write(path, architecture, {"token_embd": (embedding(), Q4)})
    assert_streams_what_loads(path, dtype)


@pytest.mark.parametrize(("first", "second"), [(Q4, Q8), (Q8, Q4)])
def test_of_two_copies_of_one_embedding_the_more_precise_is_taken(
    first: GGMLQuantizationType, second: GGMLQuantizationType, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    both = {"token_embd": (embedding(), first), "output": (embedding(), second)}
    write(path, "llama", both)
    found = assert_streams_what_loads(path, torch.float32)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    exact = torch.tensor(gguf.dequantize(gguf.quantize(embedding().numpy(), Q8), Q8))
    assert torch.equal(found["lm_head.weight"], exact)


def test_embeddings_that_differ_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, "llama", {"token_embd": (embedding(), Q4), "output": (embedding(2), Q8)})
    found = assert_streams_what_loads(path, torch.float32)
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_nothing_is_kept_of_what_was_yielded(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, "llama", {"token_embd": (embedding(), Q8)})
    for _name, tensor in stream_weights(path, load_config(path)):
        gone = weakref.ref(tensor)
        del tensor
        assert gone() is None


def test_a_program_gets_its_weights_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, "llama", {"token_embd": (embedding(), Q8)})
    program = load_weights(gt.capture(load_model(path, dtype="fp32", device="meta")))
    expected = load_model(path, dtype="fp32").state_dict()
    assert_same_tensors(dict(program.state_dict()), dict(expected))
