"""With a cache the file decodes as the program does, and ExecuTorch's own runner can drive it."""

import errno
import importlib
import json
import resource
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import graphtune as gt
from graphtune.errors import UserError
from graphtune.export import to_executorch
from graphtune.export.device_calls import load
from graphtune.export.executorch_backends import BACKENDS
from graphtune.passes import QAT, Convert, KVCache
from tests.export.test_executorch import VOCAB, tiny_llama, tokenizer  # noqa: F401
from tests.oracles.models import FAMILIES, MIXTURES, random_ids, tiny_model

LENGTH, PREFILL = 64, 8
# Resolved only if these tests run: executorch is an optional dependency.
executorch = importlib.import_module("executorch.runtime")
module = importlib.import_module("graphtune.export.executorch")


def lowered(program, folder, **options):
    return to_executorch(program, folder, max_seq_len=LENGTH, prefill=PREFILL, **options)


def greedy(run, prompt, count):
    """What a device does: the prompt in parts, then its own tokens one by one."""
    position, found = 0, []
    for part in prompt.split(PREFILL, dim=1):
        end = position + part.shape[1]
        logits = run(part.contiguous(), torch.arange(position, end))
        position = end
    while True:
        found.append(int(logits[0, -1].argmax()))
        if len(found) == count:
            return found
        logits = run(torch.tensor([found[-1:]]), torch.tensor([position]))
        position += 1


@torch.no_grad()
def continued(model, prompt, count):
    """The likeliest tokens by transformers, which reads the whole text for each."""
    ids = prompt
    for _ in range(count):
        new = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, new[None]], dim=1)
    return ids[0, prompt.shape[1] :].tolist()


def wide(family):
    """A model whose rows are multiples of 32, which XNNPACK's groups of 4 bits need."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.hidden_size, config.intermediate_size = 64, 96
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_llama(None).eval()


@pytest.fixture(scope="module")
def program(model):
    return gt.capture(model)


@pytest.fixture(scope="module")
def report(program, tokenizer, tmp_path_factory):  # noqa: F811
    return lowered(program, tmp_path_factory.mktemp("out"), tokenizer=tokenizer)


@pytest.mark.parametrize("length", [1, PREFILL, 2 * PREFILL + 3])
def test_the_file_decodes_as_transformers_does(length, report, model):
    prompt, count = random_ids(1, length) % VOCAB, 40
    assert greedy(load(report.path), prompt, count) == continued(model, prompt, count)


def test_each_logit_is_that_of_the_whole_text(report, model):
    ids, run = random_ids(1, LENGTH) % VOCAB, load(report.path)
    with torch.no_grad():
        expected = model(ids).logits[0]
    found = {PREFILL - 1: run(ids[:, :PREFILL].contiguous(), torch.arange(PREFILL))}
    for position in range(PREFILL, LENGTH):
        found[position] = run(ids[:, position : position + 1].clone(), torch.tensor([position]))
    for position, logits in found.items():
        torch.testing.assert_close(logits[0, 0], expected[position], rtol=0, atol=1e-4)


def test_what_is_longer_than_the_cache_is_refused(report):
    run = load(report.path)
    with pytest.raises(RuntimeError):  # more than a call takes
        run(torch.zeros(1, PREFILL + 1, dtype=torch.int64), torch.arange(PREFILL + 1))
    with pytest.raises(RuntimeError):  # beyond the last position
        run(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([LENGTH]))


def test_caches_are_written_in_place_and_are_not_in_the_file(report, program):
    assert report.coverage["aten_linear_default"] == (7 * 2 + 1, 0)
    assert report.coverage["aten_bmm_default"] == (2 * 2, 0)
    assert report.coverage["aten_index_put_default"] == (0, 2 * 2)
    assert report.greedy_equal == report.greedy_tokens == LENGTH - 1
    weights = 4 * sum(parameter.numel() for parameter in program.parameters())
    embedding = 4 * program.config.vocab_size * program.config.hidden_size
    assert report.size_bytes < 1.1 * (weights + embedding) + 100_000


def test_the_metadata_says_that_there_is_a_cache(report):
    loaded = executorch.Runtime.get().load_program(report.path)
    constants = {
        name: loaded.load_method(name).execute([]) for name in loaded.method_names - {"forward"}
    }
    assert constants == {
        "get_bos_id": [0],
        "get_eos_ids": [1, 7],
        "get_max_context_len": [LENGTH],
        "get_max_seq_len": [PREFILL],
        "get_vocab_size": [VOCAB],
        "enable_dynamic_shape": [True],
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [False],
    }


def test_executorchs_llm_runner_generates_the_same_tokens(report, tokenizer, model):  # noqa: F811
    runner = importlib.import_module("executorch.extension.llm.runner")
    prompt, new = "the quick brown fox jumps over the lazy dog", 9
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert ids.shape[1] > PREFILL  # so that it is given in parts
    expected = model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=1)
    pieces = []
    config = runner.GenerationConfig(max_new_tokens=new, temperature=0.0, echo=False)
    runner.TextLLMRunner(str(report.path), str(report.path.with_name("tokenizer.json"))).generate(
        prompt, config, token_callback=pieces.append
    )
    assert "".join(pieces) == tokenizer.decode(expected[0, ids.shape[1] :])


def test_the_manifest_tells_of_the_tokenizer_and_the_checks(report):
    manifest = json.loads((report.path.parent / "manifest.json").read_text())
    parity = manifest["report"]["tokenizer"]
    assert parity["texts"] == 5 and "error" not in parity
    for text in parity["differs"].values():
        assert text["found"] != text["expected"]
    assert [check["what"] for check in manifest["checks"]] == [
        "the lowered program",
        "its greedy answer, beside the whole text read at once",
    ]
    assert all(check["max_abs_diff"] < 1e-4 for check in manifest["checks"])


def test_a_file_that_forgets_is_not_kept(report, program, monkeypatch, tmp_path):
    """A cache of other positions is not this program's."""

    def copy(call, path, *_):
        shutil.copy(report.path, path)
        return 1, {}

    def forgetful(*_):
        run = load(report.path)
        return lambda tokens, at: run(tokens, at - at[:1])

    monkeypatch.setattr(module, "lower", copy)
    monkeypatch.setattr(module, "load", forgetful)
    with pytest.raises(RuntimeError, match="a logit differs"):
        lowered(program, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(report, program, monkeypatch, tmp_path):
    def copy(call, path, *_):
        path.write_bytes(report.path.read_bytes())
        return 1, {}

    monkeypatch.setattr(module, "lower", copy)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match=r"does not fit.*nothing was kept") as raised:
            lowered(program, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.__cause__.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_integers_decode_as_they_do_in_python(tmp_path):
    base = gt.capture(wide("llama"))
    rules = ["all-linear", "lm_head", {"sites": "*embed_tokens", "scheme": "int8"}]
    integers = base.apply(QAT(targets=rules), Convert()).eval()
    made = to_executorch(integers, tmp_path / "out", max_seq_len=96, prefill=PREFILL)
    assert made.coverage["torchao_quantize_affine_default"][1] == 0
    assert made.greedy_equal == made.greedy_tokens == 64 and made.greedy_gap == 0
    prompt, count = random_ids(1, 5), 64
    cached = integers.apply(KVCache(length=96, prefill=PREFILL)).eval()
    with torch.no_grad():
        expected = greedy(lambda ids, at: cached(ids, position_ids=at), prompt, count)
    assert greedy(load(made.path), prompt, count) == expected


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["8da4w", "8da8w"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_integers_of_other_families(family, scheme, tmp_path):
    base = gt.capture(wide(family))
    made = lowered(base.apply(QAT(scheme=scheme), Convert()).eval(), tmp_path)
    assert made.greedy_tokens == LENGTH - 1
    assert made.greedy_gap <= made.max_abs_diff  # equal, but for ties
    assert made.greedy_equal >= LENGTH - 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3"])
def test_other_families_decode_as_transformers_does(family, tmp_path):
    model = tiny_model(family).eval()
    made = lowered(gt.capture(model), tmp_path)
    prompt, count = random_ids(1, 13), 50  # more than windows, and than rings
    assert greedy(load(made.path), prompt, count) == continued(model, prompt, count)


@pytest.mark.slow
def test_weights_go_to_a_file_of_their_own(program, report, tmp_path):
    made = lowered(program, tmp_path, split_weights=True)
    weights = tmp_path / "model.ptd"
    assert made.path.stat().st_size < 0.5 * weights.stat().st_size
    prompt = random_ids(1, 5) % VOCAB
    assert greedy(load(made.path, weights), prompt, 30) == greedy(load(report.path), prompt, 30)
    assert "model.ptd" in json.loads((tmp_path / "manifest.json").read_text())["files"]


@pytest.mark.slow
def test_portable_operators_need_no_backend(program, tmp_path):
    made = lowered(program, tmp_path, backend="portable")
    assert made.delegates == made.delegated_nodes == 0
    assert made.greedy_equal == LENGTH - 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"xnnpack", "portable"}))
def test_other_backends_are_lowered_to_or_say_why_not(backend, program, tmp_path):
    try:
        made = lowered(program, tmp_path / "out", backend=backend)
    except UserError as error:
        assert backend in str(error)
        assert not list(tmp_path.iterdir())
    else:
        assert made.delegated_nodes > 0 and made.size_bytes > 0
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["was_run"] == BACKENDS[backend].runs_here


def test_an_unknown_backend(program, tmp_path):
    with pytest.raises(UserError, match="did you mean `xnnpack`"):
        lowered(program, tmp_path / "out", backend="xnnpak")


@pytest.mark.slow
@pytest.mark.parametrize("family", MIXTURES)
def test_an_operator_that_devices_have_not(family, tmp_path):
    with pytest.raises(UserError, match="xnnpack cannot run this program"):
        lowered(gt.capture(tiny_model(family)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_model(tokenizer, tmp_path):  # noqa: F811
    config = tiny_llama(None).config
    config.vocab_size = VOCAB - 10
    small = gt.capture(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match=rf"has the id {VOCAB - 1}.*vocabulary is {VOCAB - 10}"):
        lowered(small, tmp_path / "out", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": 99}, "`prefill=99` must be from 2 to `max_seq_len=64`"),
        ({"max_seq_len": 65}, "`max_seq_len=65` must be .* at most .* 64"),
    ],
)
def test_lengths_must_suit(options, message, program, tmp_path):
    with pytest.raises(UserError, match=message):
        to_executorch(program, tmp_path / "out", **{"max_seq_len": LENGTH, **options})


def test_a_cache_needs_a_graph_and_one_row(program, tmp_path):
    with pytest.raises(UserError, match="graphtune.capture"):
        lowered(tiny_llama(None), tmp_path / "out")
    two = program.apply(KVCache(length=LENGTH, batch=2))
    with pytest.raises(UserError, match="has 2 rows"):
        lowered(two, tmp_path / "out")
