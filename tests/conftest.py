"""Fixtures that several parts' tests share: tiny models of each family, and the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SMOLLM2 = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def no_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M, unpacked into the user's cache as the demo would."""
    from contracts.model import resolve_model

    return resolve_model(SMOLLM2)


@pytest.fixture
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `slimserve` as a user would, with its output captured."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            [sys.executable, "-m", "slimserve", *arguments], capture_output=True, text=True, timeout=300, **options
        )

    return run
