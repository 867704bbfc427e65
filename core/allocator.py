"""tcmalloc for programs that train: a fast allocator must be loaded before everything else.

Training allocates and frees tensors of many sizes in every step. glibc's allocator keeps the freed ones in sorted lists
and walks these lists; with aligned memory, as torch asks for, they become longer with every step (docs/log.md,
2026-11-28).
"""

from __future__ import annotations

import ctypes.util
import os
import sys

_PRELOAD = "LD_PRELOAD"


def find_fast_allocator() -> str | None:
    """Return the file name of tcmalloc, or None if it is not installed."""
    return ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")


def restart_with_fast_allocator() -> None:
    """Start this program again in the same process with tcmalloc, if that is installed.

    Does nothing if the program has been started with an allocator of its own. Call it before imports that take time.
    """
    loaded = os.environ.get(_PRELOAD, "")
    library = find_fast_allocator()
    if library is None or "malloc" in loaded:
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    environment = {**os.environ, _PRELOAD: ":".join(filter(None, (library, loaded)))}
    os.execve(sys.executable, sys.orig_argv, environment)  # noqa: S606
