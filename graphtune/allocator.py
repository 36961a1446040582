"""The allocator of a process's memory on the CPU, which is chosen before it starts.

glibc's leaves holes between the large tensors of training steps, and asks the system for more.
tcmalloc and jemalloc (https://jemalloc.net) keep blocks by size and use them again.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libjemalloc.so.2")  # best first


def _folders() -> Iterator[Path]:
    """Where a library may be: what the user says, conda's, the system's."""
    yield from map(Path, filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")))
    yield Path(sys.prefix, "lib")
    for parent in (Path("/usr/local"), Path("/usr")):
        yield parent / "lib" / (sysconfig.get_config_var("MULTIARCH") or "")
        yield parent / "lib64"


def find_allocator() -> Path | None:
    """An installed library that is better than the system's own allocator."""
    folders = list(_folders())
    paths = (folder / name for name in LIBRARIES for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def preload_allocator() -> None:
    """Start this command anew with a better allocator, where Linux has one installed.

    A user who has set `LD_PRELOAD`, if only to nothing, has chosen already.
    """
    if sys.platform != "linux" or "LD_PRELOAD" in os.environ:
        return
    if (found := find_allocator()) is not None:
        os.environ["LD_PRELOAD"] = str(found)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def allocator_name() -> str:
    """`tcmalloc`, `jemalloc`, or `system` where none is preloaded."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    return next((name for name in ("tcmalloc", "jemalloc") if name in preloaded), "system")
