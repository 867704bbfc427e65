"""Run one side of a benchmark in its own process, so that the other side's memory and warm-up do not affect it."""

from __future__ import annotations

import json
import subprocess
import sys


def in_process(module: str, side: str) -> dict[str, float]:
    """Return the JSON object that `python -m module side` prints.

    Raises RuntimeError with the end of the standard error output if the process fails.
    """
    process = subprocess.run([sys.executable, "-m", module, side], capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{module} {side} failed: {process.stderr[-1000:]}")
    result: dict[str, float] = json.loads(process.stdout)
    return result
