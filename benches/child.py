"""A measurement in a process of its own, so that what one side allocated or warmed up is not the other's."""

from __future__ import annotations

import json
import subprocess
import sys


def in_process(module: str, side: str) -> dict[str, float]:
    """The JSON object that `python -m module side` prints; RuntimeError with the end of its messages where it fails."""
    done = subprocess.run([sys.executable, "-m", module, side], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {side} failed: {done.stderr[-1000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found
