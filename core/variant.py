"""Variants: model directories that stock tools load, each with a manifest `slimserve.json` of how it was made."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from slimserve.core.config import StrictModel
from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.core.provenance import versions
from slimserve.core.score_calibration import ScoreCalibration
from slimserve.core.storage import write_atomically

MANIFEST_FILE = "slimserve.json"


class BaseModelRecord(StrictModel):
    """The model that a variant was made from."""

    model: str
    """The model argument as the user gave it."""
    sha256: str
    """Hash of the base model's config, tokenizer and weights, or of the file if it is a GGUF."""
    note: str = ""


class StepRecord(StrictModel):
    """The record of one step of a recipe."""

    name: str
    seconds: float
    detail: dict[str, Any] = Field(default_factory=dict)
    """Method, sizes before and after, error per layer, and numerical fallbacks of the step."""


class Manifest(StrictModel):
    """The content of `slimserve.json`."""

    format: int = 1
    name: str
    recipe: str
    resolved_recipe: dict[str, Any] = Field(default_factory=dict)
    base: BaseModelRecord
    steps: list[StepRecord]
    num_parameters: int
    """Number of parameters; tied ones count once, and the scales of a quantized model do not count."""
    calibration_sha256: str | None = None
    """Hash of the calibration samples; None if no step uses data."""
    calibration: dict[str, Any] = Field(default_factory=dict)
    """Source of the calibration samples, and the numbers requested and available."""
    score_calibrations: dict[str, ScoreCalibration] = Field(default_factory=dict)
    """Calibration of the label scores by workload (`slimserve calibrate`)."""
    rerank: dict[str, Any] | None = None
    """Rerank template (serve/policy/rerank_templates.py); None takes the one that the model is known for."""
    seed: int | None = None
    peak_rss_bytes: int | None = None
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = Field(default_factory=versions)
    hardware: dict[str, Any] = Field(default_factory=lambda: probe_hardware().as_dict())

    @property
    def build_s(self) -> float:
        """Total seconds of all steps."""
        return sum(step.seconds for step in self.steps)


def write_manifest(directory: Path, manifest: Manifest) -> Path:
    """Write the manifest of a directory and return its file."""
    file = directory / MANIFEST_FILE
    write_atomically(file, manifest.model_dump_json(indent=2) + "\n")
    return file


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a directory; None without one. Raises UserError if it is invalid."""
    file = directory / MANIFEST_FILE
    if not file.is_file():
        return None
    try:
        return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(
            "manifest", file, f"is not a slimserve manifest ({error.errors()[0]['msg']})", "build the variant again"
        ) from error


def disk_bytes(directory: Path) -> int:
    """Return the total size of all files under a directory in bytes."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
