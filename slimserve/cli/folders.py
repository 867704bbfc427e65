"""Default output folders."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path


def new_run_folder(name: str) -> Path:
    return Path("results") / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"
