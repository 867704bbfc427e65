"""Run a command and measure the whole process: seconds by the wall clock, and peak memory.

Run as a script, this file is the parent of the measured process. The kernel counts the
memory of the process that called exec into the peak of the one that follows, so a large
Python process would put its own size into the peak of every child; this one is small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """What one process took."""

    wall_s: float
    peak_rss_gib: float
    """Largest resident set of the process itself; processes that it starts are not added."""
    last_line: str
    """The last line of its standard output."""


def measure(command: Sequence[str], log: Path, variables: Mapping[str, str]) -> Measured:
    """Run `command` with its output in `log`; raises RuntimeError with the log's end where it fails."""
    parent = [sys.executable, "-S", "-E", __file__, str(log), *command]
    done = subprocess.run(parent, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    taken = json.loads(done.stdout)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if taken["status"]:
        end = "\n".join(lines[-15:])
        raise RuntimeError(f"{' '.join(command)} ended with status {taken['status']}:\n{end}")
    output = log.with_suffix(".out").read_text(encoding="utf-8").splitlines()
    return Measured(taken["wall_s"], taken["peak_rss_bytes"] / 2**30, output[-1] if output else "")


def _parent(log: str, command: list[str]) -> dict[str, float]:
    with Path(log).open("wb") as errors, Path(log).with_suffix(".out").open("wb") as output:
        start = time.perf_counter()
        pid = os.posix_spawnp(
            command[0],
            command,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, errors.fileno(), 2),
            ],
        )
        _, status, usage = os.wait4(pid, 0)
        wall_s = time.perf_counter() - start
    return {
        "status": os.waitstatus_to_exitcode(status),
        "wall_s": wall_s,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


if __name__ == "__main__":
    print(json.dumps(_parent(sys.argv[1], sys.argv[2:])))
