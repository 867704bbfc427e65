"""A variant: a model directory that stock tools load, with `slimserve.json` that says how it was made."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.core.provenance import versions

MANIFEST_FILE = "slimserve.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelRecord(_Strict):
    """The model that a variant was made from."""

    model: str
    """The model argument as the user gave it."""
    sha256: str
    """Hash of the source's config, tokenizer and weights (of the file itself for a GGUF)."""
    note: str = ""


class StepRecord(_Strict):
    """One step of a recipe, as it went."""

    name: str
    seconds: float
    detail: dict[str, Any] = Field(default_factory=dict)
    """What the step did: method, sizes before and after, error per layer, fallbacks."""


class Manifest(_Strict):
    """The content of `slimserve.json`."""

    format: int = 1
    name: str
    recipe: str
    resolved_recipe: dict[str, Any] = Field(default_factory=dict)
    base: BaseModelRecord
    steps: list[StepRecord]
    num_parameters: int
    """Parameters of the model, tied ones counted once; scales of a quantized model not counted."""
    calibration_sha256: str | None = None
    """Hash of the calibration samples; None where no step looked at data."""
    calibration: dict[str, Any] = Field(default_factory=dict)
    """Where the calibration samples came from, and how many were asked for and found."""
    seed: int | None = None
    peak_rss_bytes: int | None = None
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = Field(default_factory=versions)
    hardware: dict[str, Any] = Field(default_factory=lambda: probe_hardware().as_dict())

    @property
    def build_s(self) -> float:
        """Seconds that all steps took together."""
        return sum(step.seconds for step in self.steps)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a directory; None where it has none, as a model that others made."""
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
    """Bytes of all files under a model directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
