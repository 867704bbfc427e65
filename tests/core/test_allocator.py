"""Restarting with tcmalloc: the same program, arguments, input and process, once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slimserve.core.allocator import find_fast_allocator

SCRIPT = """
import os, sys
print("start", os.getpid(), flush=True)
from slimserve.core.allocator import restart_with_fast_allocator
restart_with_fast_allocator()
print(sys.argv[1:], "tcmalloc" in open("/proc/self/maps").read())
"""
needs_tcmalloc = pytest.mark.skipif(find_fast_allocator() is None, reason="tcmalloc is not installed")


def run(*command: str, **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | variables
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return finished.stdout.splitlines()


@needs_tcmalloc
def test_the_program_starts_again_once_with_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    first, second, end = run(sys.executable, "-W", "ignore", str(script), "--rate", "a b")
    assert first == second  # the same process
    assert end == "['--rate', 'a b'] True"


@needs_tcmalloc
def test_another_allocator_stays(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    (_, end) = run(sys.executable, str(script), LD_PRELOAD="libjemalloc-absent.so")
    assert end == "[] False"


@needs_tcmalloc
def test_the_command_that_trains_uses_it_and_others_do_not(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit\natexit.register(lambda: print('tcmalloc' in open('/proc/self/maps').read()))\n"
    )
    shown = {
        name: run(sys.executable, "-m", "slimserve", name, "--help", PYTHONPATH=str(tmp_path))[-1]
        for name in ("distill", "pipeline", "compress")
    }
    assert shown == {"distill": "True", "pipeline": "True", "compress": "False"}
