"""Rendering of report pages, and the number formats of pages and terminal tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slimserve.workloads.interface import Estimate

NOT_KNOWN = "–"


@dataclass(frozen=True)
class Plot:
    """A plot of a page: SVG with a title and a sentence that explains how to read it."""

    title: str
    hint: str
    svg: str


@dataclass(frozen=True)
class Line:
    """A label and its text."""

    label: str
    text: str


def render_page(template: str, **values: Any) -> str:
    """Render a template of this package as a self-contained page that loads no other file."""
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
    """Format seconds as milliseconds with at least three digits, without the unit."""
    return NOT_KNOWN if seconds is None else number_text(seconds * 1000)


def number_text(value: float | None) -> str:
    """Format a number with three digits, or without decimals if it has more digits."""
    if value is None or math.isnan(value):
        return NOT_KNOWN
    size = abs(value)
    if size >= 99.95 or value == 0:
        return f"{value:,.0f}"
    digits = 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:.{digits}f}" if size >= 0.001 else f"{value:.2g}"


def percent_text(frac: float | None, digits: int = 0) -> str:
    """Format a fraction as a percentage with `digits` decimals."""
    return NOT_KNOWN if frac is None or math.isnan(frac) else f"{frac:.{digits}%}"


def estimate_text(estimate: Estimate) -> str:
    """Format a quality metric with its 95% interval and its number of samples."""
    if math.isnan(estimate.value):
        return f"{NOT_KNOWN} (n {estimate.n})"
    value, low, high = (plain_text(number) for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}] (n {estimate.n:,})"


def plain_text(value: float) -> str:
    """Format a quality metric with three decimals below ten, so that a value and its interval have the same number."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def words(name: str) -> str:
    """Turn the name of a field into words."""
    return name.replace("_", " ")


def setting_lines(settings: Mapping[str, Any], prefix: str = "") -> Iterator[Line]:
    """Yield settings as lines; nested ones get the name of their group, and empty ones are omitted."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from setting_lines(value, f"{prefix}{words(name)}: ")
        elif value not in (None, "", (), []):
            parts = value if isinstance(value, list | tuple) else [value]
            text = ", ".join(f"{part:.4g}" if isinstance(part, float) else str(part) for part in parts)
            yield Line(prefix + words(name), text)


def environment_lines(document: Mapping[str, Any]) -> list[Line]:
    """Return the commit, hardware and versions of a result document as lines."""
    hardware = document["hardware"]
    machine = [f"{hardware['cpu']}, {len(hardware['cores'])} cores", f"{hardware['memory_gib']} GiB", *hardware["gpus"]]
    versions = [f"{name} {version}" for name, version in document["versions"].items()]
    return [
        Line("hardware", ", ".join(machine)),
        Line("commit", str(document["commit"])),
        Line("versions", ", ".join(versions)),
    ]
