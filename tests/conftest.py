"""Settings for every test; they must be made before torch and huggingface_hub are imported."""

import atexit
import functools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # tests make their models, or read them from packages
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# Tiny shapes: threads cost more than they bring, and two pools that spin on the same cores
# slow each other many times over.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# What `datasets` makes of files; for the processes that tests start too.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="graphtune-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

CACHE = os.environ.get("GRAPHTUNE_CACHE")


@pytest.fixture(autouse=True)
def written_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers writes its causal mask out, as a Program does. Where it leaves the mask to the
    attention kernel, that skips what is masked, and on some CPUs gradients differ in a last bit.
    """
    monkeypatch.setattr(
        "transformers.masking_utils._ignore_causal_mask_sdpa", lambda *_, **__: False
    )


@pytest.fixture(autouse=True)
def own_examples(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests keep no examples in the user's cache; the models that they download do stay there."""
    own = functools.cache(lambda: tmp_path_factory.mktemp("cache"))

    def cache_dir() -> Path:
        set_by_test = os.environ.get("GRAPHTUNE_CACHE")
        return Path(set_by_test) if set_by_test and set_by_test != CACHE else own()

    monkeypatch.setattr("graphtune.data.example_cache.cache_dir", cache_dir)


@pytest.fixture(autouse=True)
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dtype: auto` is float32, also on a CPU that has units for bfloat16."""
    import torch  # not before the settings above are made

    without = {k: v for k, v in torch.cpu.get_capabilities().items() if k != "amx_bf16"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: without)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is heard, also where the tests run in the background of a shell, which ignores it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture
def not_lowered() -> Iterator[None]:
    """Traced and partitioned as by inductor, but run operator by operator: quick to compile."""
    import torch

    torch._dynamo.reset()
    torch.compiler.set_default_backend("aot_eager_decomp_partition")
    yield
    torch.compiler.set_default_backend(None)
