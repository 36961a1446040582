"""Where graphtune keeps what it would not make or download twice; safe to delete."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$GRAPHTUNE_CACHE`, or `~/.cache/graphtune`.

    Models from PyPI lie in it by package, captured graphs in `captures`, tokenised examples in
    `examples`.
    """
    return Path(os.environ.get("GRAPHTUNE_CACHE") or "~/.cache/graphtune").expanduser()
