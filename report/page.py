"""What the pages of both reports share: how they are rendered, and how figures are written for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slimserve.workloads.interface import Estimate

NOT_KNOWN = "–"


@dataclass(frozen=True)
class Plot:
    """One plot of a page: SVG with a title above it and a sentence that says how to read it."""

    title: str
    hint: str
    svg: str


@dataclass(frozen=True)
class Line:
    """A figure's name and its text."""

    label: str
    text: str


def render_page(template: str, **values: Any) -> str:
    """Render a template of this package as one self-contained page that loads no other file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("slimserve.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def ms_text(seconds: float | None) -> str:
    """Seconds as milliseconds to three digits at least, without the unit."""
    return NOT_KNOWN if seconds is None else number_text(seconds * 1000)


def number_text(value: float | None) -> str:
    """A figure to three digits, or to the unit where it has more."""
    if value is None or math.isnan(value):
        return NOT_KNOWN
    size = abs(value)
    if size >= 99.95 or value == 0:
        return f"{value:,.0f}"
    digits = 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:.{digits}f}" if size >= 0.001 else f"{value:.2g}"


def percent_text(share: float | None, digits: int = 0) -> str:
    return NOT_KNOWN if share is None or math.isnan(share) else f"{share:.{digits}%}"


def estimate_text(estimate: Estimate) -> str:
    """A quality figure with its 95% interval and number of samples."""
    if math.isnan(estimate.value):
        return f"{NOT_KNOWN} (n {estimate.n})"
    value, low, high = (plain_text(number) for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}] (n {estimate.n:,})"


def plain_text(value: float) -> str:
    """A quality figure: three decimals below ten, so that a figure and its interval have as many."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def words(name: str) -> str:
    """A figure's name in code as words."""
    return name.replace("_", " ")


def setting_lines(settings: Mapping[str, Any], prefix: str = "") -> Iterator[Line]:
    """Settings as they were given, nested ones with their path; empty ones are left out."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from setting_lines(value, f"{prefix}{words(name)}: ")
        elif value not in (None, "", (), []):
            parts = value if isinstance(value, list | tuple) else [value]
            text = ", ".join(f"{part:.4g}" if isinstance(part, float) else str(part) for part in parts)
            yield Line(prefix + words(name), text)


def origin_lines(document: Mapping[str, Any]) -> list[Line]:
    """Commit, hardware and versions of a result file."""
    hardware = document["hardware"]
    machine = [f"{hardware['cpu']}, {len(hardware['cores'])} cores", f"{hardware['memory_gib']} GiB", *hardware["gpus"]]
    versions = [f"{name} {version}" for name, version in document["versions"].items()]
    return [
        Line("hardware", ", ".join(machine)),
        Line("commit", str(document["commit"])),
        Line("versions", ", ".join(versions)),
    ]
