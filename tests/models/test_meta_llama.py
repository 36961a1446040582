"""Meta's layout, against Meta's arithmetic: its rotation of neighbouring channels, by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphtune as gt
from graphtune.errors import UserError
from graphtune.models import load_config, load_model
from graphtune.models.streaming import stream_weights
from graphtune.passes import LoRA
from graphtune.weights import load_weights
from tests.oracles.models import random_ids

PARAMS: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 128,
    "multiple_of": 8,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
FEED_FORWARD = 112  # int(1.3 * int(8 * 32 / 3)) = 110, up to a multiple of 8
AXIS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def random_weights(params: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Whole tensors under Meta's names."""
    dim, head_dim = params["dim"], params["dim"] // params["n_heads"]
    kv = (params["n_kv_heads"] or params["n_heads"]) * head_dim
    shapes = {
        "attention.wq": (dim, dim),
        "attention.wk": (kv, dim),
        "attention.wv": (kv, dim),
        "attention.wo": (dim, dim),
        "feed_forward.w1": (FEED_FORWARD, dim),
        "feed_forward.w2": (dim, FEED_FORWARD),
        "feed_forward.w3": (FEED_FORWARD, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
    }
    named = {"tok_embeddings": (128, dim), "norm": (dim,), "output": (128, dim)}
    for i in range(params["n_layers"]):
        named |= {f"layers.{i}.{name}": shape for name, shape in shapes.items()}
    random = torch.Generator().manual_seed(seed)
    return {
        f"{name}.weight": torch.randn(shape, generator=random) / math.sqrt(shape[-1]) * 2
        for name, shape in named.items()
    }


def reference(weights: dict[str, Tensor], params: dict[str, Any], ids: Tensor) -> Tensor:
    """Logits as Meta's model computes them: rotary embedding by complex numbers."""

    def norm(x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"])
        return x * scale * weights[f"{name}.weight"]

    head_dim = params["dim"] // params["n_heads"]
    seq = ids.shape[1]
    frequencies = frequencies_of(params, head_dim)
    angles = torch.outer(torch.arange(seq, dtype=torch.float32), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(3)

    x = weights["tok_embeddings.weight"][ids]
    future = torch.full((seq, seq), -math.inf).triu(1)
    for i in range(params["n_layers"]):
        at = f"layers.{i}"
        h = norm(x, f"{at}.attention_norm")
        q, k, v = (
            (h @ weights[f"{at}.attention.{w}.weight"].T).unflatten(-1, (-1, head_dim))
            for w in ("wq", "wk", "wv")
        )
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(2, 3) / math.sqrt(head_dim) + future).softmax(-1)
        x = x + (scores @ v).transpose(1, 2).flatten(2) @ weights[f"{at}.attention.wo.weight"].T
        h = norm(x, f"{at}.ffn_norm")
        w1, w2, w3 = (weights[f"{at}.feed_forward.{w}.weight"] for w in ("w1", "w2", "w3"))
        x = x + (torch.nn.functional.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return norm(x, "norm") @ weights["output.weight"].T


def frequencies_of(params: dict[str, Any], head_dim: int) -> Tensor:
    base = params["rope_theta"]
    plain = 1.0 / base ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if not params.get("use_scaled_rope"):
        return plain
    factor, low, high, old = params.get("factor", 8.0), 1.0, 4.0, 8192
    scaled = []
    for frequency in plain.tolist():
        length = 2 * math.pi / frequency
        if length < old / high:
            scaled.append(frequency)
        elif length > old / low:
            scaled.append(frequency / factor)
        else:
            smooth = (old / length - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return torch.tensor(scaled)


def write(
    folder: Path,
    weights: dict[str, Tensor],
    params: dict[str, Any],
    shards: int = 1,
    embedding_axis: int = 0,
    file: str = "consolidated.{:02}.pth",
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for index in range(shards):
        part = {"rope.freqs": torch.ones(4)}
        for name, tensor in weights.items():
            leaf = name.split(".")[-2]
            axis = embedding_axis if leaf == "tok_embeddings" else AXIS.get(leaf)
            part[name] = tensor if axis is None else tensor.chunk(shards, axis)[index].clone()
        torch.save(part, folder / file.format(index))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "llama", random_weights(PARAMS), PARAMS, shards=2)


@pytest.mark.parametrize(("shards", "embedding_axis"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("implementation", ["transformers", "graphtune"])
def test_logits_are_those_of_metas_model(
    shards: int, embedding_axis: int, implementation: Any, tmp_path: Path
) -> None:
    weights = random_weights(PARAMS)
    folder = write(tmp_path / "llama", weights, PARAMS, shards, embedding_axis)
    ids = random_ids(2, 19)
    expected = reference(weights, PARAMS, ids)
    model = load_model(folder, dtype="fp32", implementation=implementation)
    assert expected.std() > 0.5
    found = model(ids)
    found = found if isinstance(found, Tensor) else found.logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.training and model.config.use_cache is False


def test_as_many_keys_as_queries_and_no_vocabulary(tmp_path: Path) -> None:
    """Llama 2: params.json says less."""
    params = PARAMS | {"vocab_size": -1, "n_kv_heads": None, "rope_theta": 10000.0}
    weights = random_weights(params)
    said = {k: v for k, v in params.items() if k not in ("n_kv_heads", "rope_theta")}
    for axis in (0, 1):
        folder = write(tmp_path / f"llama{axis}", weights, said, shards=2, embedding_axis=axis)
        ids = random_ids(2, 9)
        logits = load_model(folder, dtype="fp32")(ids).logits
        torch.testing.assert_close(logits, reference(weights, params, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tied", "factor"), [(False, 8.0), (True, 32.0)])
def test_scaled_rotary_embedding(tied: bool, factor: float, tmp_path: Path) -> None:
    """Llama 3.1, and the small ones of 3.2, which have their embedding twice."""
    params = PARAMS | {"use_scaled_rope": True, "dim": 64, "n_heads": 2, "n_kv_heads": 1}
    params["ffn_dim_multiplier"] = 0.65
    weights = random_weights(params)
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    folder = write(tmp_path / "llama", weights, params)
    ids = random_ids(1, 120)
    model = load_model(folder, dtype="fp32")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.max_position_embeddings == 131_072
    expected = reference(weights, params | {"factor": factor}, ids)
    other = reference(weights, params | {"factor": 40 - factor}, ids)
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
    assert (logits - other).abs().max() > 5e-4


def test_a_tied_output_may_be_absent(tmp_path: Path) -> None:
    weights = random_weights(PARAMS)
    del weights["output.weight"]
    model = load_model(write(tmp_path / "llama", weights, PARAMS), dtype="fp32")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


# What Meta's params.json and Hugging Face's config.json of the same models say.
PUBLISHED = {
    "Llama-2-7b": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5},
        {"intermediate_size": 11008, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    ),
    "Llama-2-70b": (
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64}
        | {"n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-5},
        {"intermediate_size": 28672, "num_key_value_heads": 8, "max_position_embeddings": 4096},
    ),
    "Meta-Llama-3-8B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024}
        | {"ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0},
        {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 8192},
    ),
    "Llama-3.1-405B": (
        {"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "multiple_of": 4096}
        | {"ffn_dim_multiplier": 1.2, "rope_theta": 500000.0, "use_scaled_rope": True},
        {"intermediate_size": 53248, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    "Llama-3.2-1B": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 256}
        | {"ffn_dim_multiplier": 1.5, "rope_theta": 500000.0, "use_scaled_rope": True},
        {"intermediate_size": 8192, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    "Llama-3.2-3B": (
        {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "multiple_of": 256}
        | {"ffn_dim_multiplier": 1.0, "rope_theta": 500000.0, "use_scaled_rope": True},
        {"intermediate_size": 8192, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_are_those_of_hugging_face(name: str, tmp_path: Path) -> None:
    params, expected = PUBLISHED[name]
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": 128}))
    embedding = torch.ones(1, dtype=torch.bfloat16).expand(128, params["dim"])
    torch.save({"tok_embeddings.weight": embedding}, tmp_path / "consolidated.00.pth")
    config = load_config(tmp_path)
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.rope_parameters["rope_theta"] == params.get("rope_theta", 10000.0)
    assert config.dtype == torch.bfloat16


def test_weights_are_streamed_through_passes(checkpoint: Path) -> None:
    empty = gt.capture(load_model(checkpoint, dtype="fp32", device="meta"))
    program = load_weights(empty.apply(LoRA(rank=2)))
    ids = random_ids(2, 11)
    expected = gt.capture(load_model(checkpoint, dtype="fp32"))(ids)
    assert torch.equal(program(ids), expected)


def test_what_comes_from_a_file_is_no_part_of_it(checkpoint: Path) -> None:
    tensors = dict(stream_weights(checkpoint, load_config(checkpoint)))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()
        assert tensor.is_contiguous()
    again = dict(stream_weights(checkpoint, load_config(checkpoint)))
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_the_dtype_is_the_checkpoints(tmp_path: Path) -> None:
    weights = {name: t.bfloat16() for name, t in random_weights(PARAMS).items()}
    folder = write(tmp_path / "llama", weights, PARAMS)
    empty = load_model(folder, device="meta")
    assert {p.dtype for p in empty.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(folder, dtype="fp32").parameters()} == {torch.float32}


def test_what_torchtune_wrote_in_metas_layout(tmp_path: Path) -> None:
    weights = random_weights(PARAMS)
    folder = write(tmp_path / "llama", weights, PARAMS, file="model-00001-of-00001.bin")
    ids = random_ids(1, 7)
    logits = load_model(folder, dtype="fp32")(ids).logits
    torch.testing.assert_close(logits, reference(weights, PARAMS, ids), rtol=1e-5, atol=1e-5)


def test_a_folder_with_a_config_and_safetensors_is_hugging_faces(checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype="fp32")
    model.save_pretrained(checkpoint)
    (checkpoint / "consolidated.00.pth").write_bytes(b"")
    again = load_model(checkpoint, dtype="fp32")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def _change(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        params = json.loads((folder / "params.json").read_text())
        if value is None:
            del params[name]
        else:
            params[name] = value
        (folder / "params.json").write_text(json.dumps(params))

    return change


def _edit(index: int, edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / f"consolidated.{index:02}.pth"
        tensors = torch.load(file, weights_only=True)
        edit(tensors)
        torch.save(tensors, file)

    return change


def _cut(folder: Path) -> None:
    file = folder / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:-2000])


WQ = "layers.0.attention.wq.weight"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no params": (lambda f: (f / "params.json").unlink(), "lacks params.json"),
    "params not JSON": (lambda f: (f / "params.json").write_text("{"), "cannot be read"),
    "params a list": (lambda f: (f / "params.json").write_text("[]"), "holds a list"),
    "no dim": (_change("dim", None), "lacks 'dim'"),
    "dim of a text": (_change("dim", "32"), "dim must be a number"),
    "odd heads": (_change("n_heads", 5), "no multiple of n_heads"),
    "vision": (_change("vision_chunk_size", 560), "'vision_chunk_size' is no option"),
    "other layers": (_change("n_layers", 3), "lacks 'model.layers.2"),
    "fewer layers": (_change("n_layers", 1), "has a tensor that the model has not"),
    "other size within": (_change("multiple_of", 64), "has shape"),
    "other vocabulary": (_change("vocab_size", 130), "has shape"),
    "other kv heads": (_change("n_kv_heads", 1), "k_proj.weight has 16 rows"),
    "no shards": (lambda f: [p.unlink() for p in f.glob("*.pth")], "no consolidated.00.pth"),
    "no first": (lambda f: (f / "consolidated.00.pth").unlink(), "lacks consolidated.00.pth"),
    "no last": (lambda f: (f / "consolidated.01.pth").unlink(), "hold 16 of the 32 rows"),
    "a cut file": (_cut, "consolidated.01.pth' cannot be read"),
    "no tensors": (_edit(0, lambda t: t.update(step=3)), "'step', which is a int"),
    "unknown": (_edit(0, lambda t: t.update(more=t[WQ])), "do not belong together"),
    "no embedding": (_edit(0, lambda t: t.pop("tok_embeddings.weight")), "not Meta's Llama"),
    "does not fit": (
        _edit(1, lambda t: t.update({WQ: t[WQ][:, :8].clone()})),
        "do not fit together",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_one_line(case: str, checkpoint: Path) -> None:
    spoil, message = BAD[case]
    spoil(checkpoint)
    with pytest.raises(UserError, match=f"^model.id: .*{message}") as info:
        load_model(checkpoint, dtype="fp32")
    assert "\n" not in str(info.value)


def test_adapters_are_refused(tmp_path: Path) -> None:
    weights = random_weights(PARAMS)
    weights["layers.0.attention.wq.lora_a.weight"] = torch.ones(2, 32)
    folder = write(tmp_path / "llama", weights, PARAMS)
    with pytest.raises(UserError, match="wq.lora_a.weight', which a plain text Llama has not"):
        load_model(folder)


def test_code_in_a_file_is_not_run(checkpoint: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path(checkpoint / "ran").touch, ()

    torch.save({"x": Evil()}, checkpoint / "consolidated.00.pth")
    with pytest.raises(UserError, match="cannot be read"):
        load_model(checkpoint)
    assert not (checkpoint / "ran").exists()
