"""Build and run `llama-bench`, llama.cpp's own compiled benchmark.

No wheel on PyPI and no package of Debian 12 has this program. The sdist of llama-cpp-python contains all of llama.cpp's
source, so pip downloads it and CMake builds the program for this machine's CPU (`-march=native`, llama.cpp's default).
The cache keeps the program. The build takes 10 to 20 minutes on 2 cores and needs a C++ compiler.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

from benches.peers.environment import PINS, peer_python, peer_variables, pinned_version
from slimserve.core.hardware import probe_hardware
from slimserve.core.progress import print_status, progress
from slimserve.core.storage import atomic_directory, cache_dir

_NAME = "llama_cpp_python"
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""Compiler flags for a CPU with AMX, because llama.cpp of llama-cpp-python 0.3.36 with AMX crashes on this model."""
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


def build_llama_bench() -> Path:
    """Return the program `llama-bench`; build it if the cache does not hold it."""
    pins = PINS / f"{_NAME}.txt"
    version, hardware = pinned_version(pins, _NAME), probe_hardware()
    flags = _NO_AMX if "amx_tile" in hardware.isa else ""
    key = hashlib.sha256(f"{hardware.cpu}{hardware.isa}{flags}{_OPTIONS}".encode()).hexdigest()[:8]
    folder = cache_dir("peers") / f"llama_bench-{version}-{key}"
    program = folder / "llama-bench"
    if program.is_file():
        print_status(f"llama_bench: reuses {program}")
        return program
    python = peer_python("cmake")
    cmake, ninja = python.parent / "cmake", python.parent / "ninja"
    source, build = folder / "source", folder / "build"
    with progress(f"llama_bench: builds llama.cpp in {folder}", None, "s"):
        if not source.is_dir():
            _download(python, pins, source)
        compiler = (f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}")
        _run([cmake, "-S", source, "-B", build, "-G", "Ninja", *compiler, *_OPTIONS])
        _run([cmake, "--build", build, "--target", "llama-bench"])  # continues a build that was interrupted
        (build / "bin" / "llama-bench").rename(program)
        shutil.rmtree(build)
        shutil.rmtree(source)
    return program


def run_llama_bench(
    program: Path, gguf: Path, *, num_threads: int, prompt_tokens: int, output_tokens: int, num_repeats: int
) -> list[float]:
    """Return the tokens per second of each repeat of one test, after llama-bench's own warm-up.

    The test is a prefill with `output_tokens` = 0, or decoding of one stream with `prompt_tokens` = 0. Neither includes
    tokenization, sampling or HTTP.
    """
    command: list[str | Path] = [
        *(program, "-m", gguf, "-t", str(num_threads), "-p", str(prompt_tokens), "-n", str(output_tokens)),
        *("-r", str(num_repeats), "-o", "json"),
    ]
    (test,) = json.loads(_run(command, num_threads))
    samples: list[float] = test["samples_ts"]
    return samples


def _download(python: Path, pins: Path, source: Path) -> None:
    """Write llama.cpp's source to the new directory `source`."""
    with atomic_directory(source) as folder:
        # `--no-binary :all:` would compile pip's own build tools too.
        only_source = ("--no-deps", "--no-binary", "llama-cpp-python")
        _run([python, "-m", "pip", "download", *only_source, "--requirement", pins, "--dest", folder])
        shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder, filter="data")
        for file in next(folder.glob("*/vendor/llama.cpp")).iterdir():
            file.rename(folder / file.name)


def _run(command: list[str | Path], num_threads: int = 1) -> str:
    """Return the standard output of `command`; raise RuntimeError with the end of its errors if it fails."""
    process = subprocess.run(command, env=peer_variables(num_threads), capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{command[:4]} failed: {(process.stderr or process.stdout)[-1000:]}")
    return process.stdout
