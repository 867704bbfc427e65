"""Make and reuse a separate environment for each tool that a benchmark compares with.

`NAME.txt` beside this file pins the packages of an environment. A changed pin makes a new environment.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from slimserve.core.errors import UserError
from slimserve.core.progress import print_status, progress
from slimserve.core.storage import cache_dir

PINS = Path(__file__).parent
"""Folder of the requirements files."""
_STAMP = ".installed"


def peer_python(name: str, *, on_top_of_ours: bool = False) -> Path:
    """Return the Python interpreter of the peer `name`; make its environment if the cache does not hold it.

    With `on_top_of_ours` the environment also sees the packages of the running one, and pip installs only the packages
    of `NAME.txt`. Raises UserError if a package is not available.
    """
    pins = PINS / f"{name}.txt"
    settings = sys.prefix if on_top_of_ours else ""
    key = hashlib.sha256(pins.read_bytes() + settings.encode()).hexdigest()[:8]
    folder = cache_dir("peers") / f"{name}-{pinned_version(pins, name)}-{key}"
    python = folder / "bin" / "python"
    if (folder / _STAMP).is_file():
        print_status(f"{name}: reuses the environment in {folder}")
        return python
    shutil.rmtree(folder, ignore_errors=True)
    with progress(f"{name}: makes an environment in {folder}", None, "s"):
        _run([sys.executable, "-m", "venv", str(folder)], pins)
        if on_top_of_ours:
            own = sysconfig.get_path("purelib", vars={"base": str(folder)})
            Path(own, "ours.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        options = ["--no-deps"] * on_top_of_ours
        _run([str(python), "-m", "pip", "install", *options, "--requirement", str(pins)], pins)
    (folder / _STAMP).touch()
    return python


def peer_variables(num_threads: int) -> dict[str, str]:
    """Return the environment variables of a measured process: offline, `num_threads` threads, no PYTHONPATH."""
    ours = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    threads = {f"{library}_NUM_THREADS": str(num_threads) for library in ("OMP", "MKL", "OPENBLAS")}
    return ours | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def pinned_version(pins: Path, name: str) -> str:
    """Return the version that the requirements file `pins` gives for the package `name`."""
    lines = pins.read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    return pinned[name if name in pinned else name.replace("_", "-")]


def _run(command: list[str], pins: Path) -> None:
    process = subprocess.run(command, env=peer_variables(1), capture_output=True, text=True, check=False)
    if process.returncode:
        errors = [line for line in process.stderr.splitlines() if line.startswith("ERROR:")] or [process.stderr[-300:]]
        raise UserError(
            "peer environment",
            pins.name,
            f"cannot be installed ({errors[-1]})",
            "set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, or PIP_FIND_LINKS to a folder with the wheel, "
            "as for `make install`",
        )
