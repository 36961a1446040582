"""`import graphtune as gt`: the names are there, lazily, whichever import comes first."""

import subprocess
import sys

import pytest

import graphtune as gt


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in gt.__all__:
        assert getattr(gt, name) is not None
    assert set(gt.__all__) <= set(dir(gt))


def test_names_are_the_objects_of_their_modules() -> None:
    from graphtune.errors import UserError
    from graphtune.program import Program

    assert gt.Program is Program
    assert gt.UserError is UserError is gt.errors.UserError


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'captura'"):
        _ = gt.captura


@pytest.mark.parametrize(
    "first",
    [
        "import graphtune",
        "import graphtune.capture",
        "from graphtune.capture import capture",
        "from graphtune import capture",
        "import graphtune; graphtune.Program; import graphtune.engine, graphtune.capture",
        "import importlib; importlib.import_module('graphtune.capture')",
    ],
)
def test_capture_is_the_function_in_every_import_order(first: str) -> None:
    run(
        f"{first}\n"
        "import sys, types, graphtune as gt\n"
        "from graphtune import capture\n"
        "import graphtune.capture\n"
        "from graphtune.capture import capture as same\n"
        "assert isinstance(gt.capture, types.FunctionType), gt.capture\n"
        "assert gt.capture is capture is same is sys.modules['graphtune.capture'].capture\n"
    )


@pytest.mark.parametrize("module", ["graphtune", "graphtune.config", "graphtune.cli"])
def test_import_does_not_wait_for_torch(module: str) -> None:
    run(
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
