"""Runs of a suite at several rates: the search for the highest rate within the objectives, and the latency curve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimserve.core.errors import UserError
from slimserve.core.openai_client import Target
from slimserve.core.progress import print_status
from slimserve.loadtest.prompts import suite_name
from slimserve.loadtest.run import OnResult, run_suite, write_document
from slimserve.loadtest.search import MaxRate, Measure, RatePoint, find_max_rate, sweep
from slimserve.loadtest.settings import LoadSettings
from slimserve.loadtest.summary import LoadSummary

_START_RATE = "1"
CurvePoint = tuple[float, LoadSummary, bool]
"""Rate in requests/s, summary of the run, and whether it met every objective."""
OnCurve = Callable[[Mapping[str, Any], Sequence[CurvePoint], Path, float | None], object]
"""Called with the result document, the curve, the output folder and the highest rate that a search found."""


def find_rate(
    suite: str,
    target: Target,
    settings: LoadSettings,
    output: Path,
    on_result: OnResult | None = None,
    on_curve: OnCurve | None = None,
) -> MaxRate:
    """Search for the highest rate that meets every objective, starting at `settings.rate` (1 request/s by default).

    Each run writes its files to a folder of `output` that is named by rate and seed. `NAME.curve.json` has all of them,
    also after an interruption. Raises UserError without an objective.
    """
    if not settings.slos:
        raise UserError("--slo", "", "is missing", "state an objective for the search, such as --slo ttft_p99=500ms")
    (start_rate,) = _parse_rates("--rate", settings.rate or _START_RATE, most=1)
    points: list[RatePoint] = []
    result = None
    try:
        measure = _measure(suite, target, settings, output, points, on_result)
        result = find_max_rate(measure, start_rate, first_seed=settings.seed)
    finally:
        _write_curve(suite, target, settings, output, points, on_curve, result)
    return result


def sweep_rates(
    suite: str,
    target: Target,
    settings: LoadSettings,
    rates: str,
    output: Path,
    on_result: OnResult | None = None,
    on_curve: OnCurve | None = None,
) -> list[RatePoint]:
    """Run once at each of `rates` (1,2,4); the files are those of `find_rate`."""
    points: list[RatePoint] = []
    wanted = _parse_rates("--sweep", rates)
    try:
        return sweep(_measure(suite, target, settings, output, points, on_result), wanted, settings.seed)
    finally:
        _write_curve(suite, target, settings, output, points, on_curve)


def _measure(
    suite: str,
    target: Target,
    settings: LoadSettings,
    output: Path,
    points: list[RatePoint],
    on_result: OnResult | None,
) -> Measure:
    """Return a function that runs the suite at a rate and appends to `points`, so that an interrupt loses nothing."""
    if settings.trace:
        raise UserError("--trace", settings.trace, "has its own rate", "leave it out of a search")

    num_used = settings.suite.first_prompt

    def measure(rate: float, seed: int) -> RatePoint:
        nonlocal num_used
        # New prompts as long as there are some, because a prefix cache answers those of earlier runs.
        unused = settings.suite.model_copy(update={"first_prompt": num_used})
        at_rate = settings.model_copy(update={"rate": f"{rate:.6f}", "seed": seed, "suite": unused})
        num_used += len(at_rate.scheduled_s())
        folder = output / f"{rate:.4g}rps-seed{seed}"
        summary, _ = run_suite(suite, target, at_rate, folder, on_result=on_result)
        met = summary.num_succeeded > 0 and all(outcome.is_met for outcome in summary.objectives)
        text = ", ".join(
            f"{outcome.text} {'met' if outcome.is_met else 'missed'} ({_value_text(outcome.value)})"
            for outcome in summary.objectives
        )
        counts = f"{summary.num_requests} requests, {summary.num_requests - summary.num_succeeded} failed"
        print_status(f"{rate:.4g} requests/s: {text or counts}")
        points.append(RatePoint(rate, seed, met, summary))
        return points[-1]

    return measure


def _write_curve(
    suite: str,
    target: Target,
    settings: LoadSettings,
    output: Path,
    points: list[RatePoint],
    on_curve: OnCurve | None,
    result: MaxRate | None = None,
) -> None:
    if not points:
        return
    runs = [{"rate": one.rate, "seed": one.seed, "met": one.met, "summary": one.summary.as_dict()} for one in points]
    max_rate = {name: value for name, value in asdict(result).items() if name != "points"} if result else None
    name = suite_name(suite)
    document = write_document(
        output / f"{name}.curve.json", name, target, settings, {"max_rate": max_rate, "runs": runs}
    )
    if on_curve is not None:
        curve = [(one.rate, one.summary, one.met) for one in points]
        on_curve(document, curve, output, result.rate if result else None)
    if result:
        bound = "" if result.is_found else " or more"
        rate = "none" if result.rate is None else f"{result.rate:.4g} requests/s{bound}"
        print_status(f"highest rate within {', '.join(settings.slos)}: {rate} ({result.ended})")


def _parse_rates(option: str, text: str, most: int | None = None) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or min(rates) <= 0 or (most is not None and len(rates) > most):
        remedy = "write one rate, such as 5" if most == 1 else "write rates above 0, such as 1,2,4"
        raise UserError(option, text, "is not a rate" if most == 1 else "is not a list of rates", remedy)
    return rates


def _value_text(value: float | None) -> str:
    return "failed requests or no sample" if value is None else f"{value:.4g}"
