"""Default output folders."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path


def new_run_folder(name: str) -> Path:
    """Return a folder under `results` that is named by the current UTC time and `name`; it is not created."""
    return Path("results") / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"
