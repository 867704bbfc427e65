"""Fixtures for several folders of tests: the real model, the command line, and a server with fixed latencies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slimserve.core.hardware import probe_hardware
from slimserve.serve.launch.process import answers, free_port

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SMOLLM2 = "smollm2-135m-instruct"
FAKE_SERVER = Path(__file__).parent / "fake_server.py"


needs_avx512 = pytest.mark.skipif(
    not {"avx512f", "asimd"} & set(probe_hardware().isa),
    reason="vLLM 0.32 for AVX2 alone has no 4-bit kernel, and its INT8 product is off by 0.2 nats",
)
"""Marks tests of vLLM's quantized CPU kernels; the log of 2026-11-27 has the results with AVX2 alone."""


measures_time = pytest.mark.flaky(reruns=3, reruns_delay=2, only_rerun=["AssertionError", "Timeout"])
"""Marks tests with limits of real time. They run again after a failure, because the machine may have been busy;
the summary lists what was run again."""


@pytest.fixture(autouse=True)
def no_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the directory of the real SmolLM2-135M, unpacked into the user's cache."""
    from slimserve.core.model import resolve_model

    return resolve_model(SMOLLM2)


@pytest.fixture
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `slimserve` in its own process and captures its output."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            [sys.executable, "-m", "slimserve", *arguments], capture_output=True, text=True, timeout=300, **options
        )

    return run


@pytest.fixture(scope="session")
def fake_url() -> Iterator[str]:
    """Run fake_server.py in its own process and yield its base URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, str(FAKE_SERVER), "--port", str(port)])
    try:
        while not answers(f"{url}/health"):
            assert server.poll() is None
            time.sleep(0.05)
        yield url
    finally:
        server.kill()
        server.wait()
