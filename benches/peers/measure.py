"""Run a command and measure its wall-clock time and peak memory.

As a script, this file is the parent of the measured process. The kernel counts the memory of the process that calls
exec into the peak of the executed program. A large Python parent would add its own size to every result, so this script
stays small.
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
    """Time, memory and output of one process."""

    wall_s: float
    peak_rss_gib: float
    """Largest resident set of the process, in GiB, without its child processes."""
    last_line: str
    """Last line of standard output, or an empty string."""


def measure(command: Sequence[str], log: Path, variables: Mapping[str, str]) -> Measured:
    """Run `command` with standard error in `log` and standard output beside it, in a file `.out`.

    Raises RuntimeError with the end of the log if the command fails.
    """
    command_line = [sys.executable, "-S", "-E", __file__, str(log), *command]
    process = subprocess.run(command_line, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    usage = json.loads(process.stdout)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if usage["status"]:
        end = "\n".join(lines[-15:])
        raise RuntimeError(f"{' '.join(command)} ended with status {usage['status']}:\n{end}")
    output = log.with_suffix(".out").read_text(encoding="utf-8").splitlines()
    return Measured(usage["wall_s"], usage["peak_rss_bytes"] / 2**30, output[-1] if output else "")


def _run_child(log: str, command: list[str]) -> dict[str, float]:
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
    print(json.dumps(_run_child(sys.argv[1], sys.argv[2:])))
