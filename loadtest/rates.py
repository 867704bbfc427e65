"""Runs of a suite at different rates: the highest rate within the objectives, or the curve of latency over rate."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from slimserve.core.errors import UserError
from slimserve.core.openai_client import Target
from slimserve.core.progress import print_status
from slimserve.loadtest.run import run_suite, write_document
from slimserve.loadtest.search import MaxRate, Measure, Point, Probe, find_max_rate, sweep
from slimserve.loadtest.settings import LoadSettings
from slimserve.report.load import print_curve, write_curve_html

_START_RATE = "1"


def find_rate(suite: str, target: Target, settings: LoadSettings, output: Path) -> MaxRate:
    """Search the highest rate that keeps every objective, beginning at `settings.rate` (1/s if not given).

    Each run leaves its files in a folder of `output` named by rate and seed; `SUITE.curve.json` and `SUITE.curve.html`
    hold all of them. Raises UserError where there is no objective to keep.
    """
    if not settings.slos:
        raise UserError("--slo", "", "is missing", "say what the highest rate must keep, as --slo ttft_p99=500ms")
    (start_rate,) = _rates("--rate", settings.rate or _START_RATE, most=1)
    points: list[Point] = []
    found = None
    try:
        found = find_max_rate(_measure(suite, target, settings, output, points), start_rate, first_seed=settings.seed)
    finally:
        _report(suite, target, settings, output, points, found)
    return found


def sweep_rates(suite: str, target: Target, settings: LoadSettings, rates: str, output: Path) -> list[Point]:
    """One run at each of `rates` (1,2,4), which leave their files as those of a search do."""
    points: list[Point] = []
    wanted = _rates("--sweep", rates)
    try:
        return sweep(_measure(suite, target, settings, output, points), wanted, settings.seed)
    finally:
        _report(suite, target, settings, output, points)


def _measure(suite: str, target: Target, settings: LoadSettings, output: Path, points: list[Point]) -> Measure:
    """Runs the suite at a rate; what was measured is appended to `points`, so that an interrupt does not lose it."""
    if settings.trace:
        raise UserError("--trace", settings.trace, "has a rate of its own", "leave it out of a search")

    num_asked = settings.suite.first_prompt

    def measure(rate: float, seed: int) -> Probe:
        nonlocal num_asked
        # Arrivals of their own, and prompts that no earlier run asked while there are such: caches know those.
        unasked = replace(settings.suite, first_prompt=num_asked)
        at_rate = replace(settings, rate=f"{rate:.6f}", seed=seed, suite=unasked)
        num_asked += len(at_rate.due_s())
        summary, _ = run_suite(suite, target, at_rate, output / f"{rate:.4g}rps-seed{seed}")
        met = all(outcome.is_met for outcome in summary.objectives)
        said = ", ".join(
            f"{outcome.text} {'kept' if outcome.is_met else 'missed'} ({_value(outcome.value)})"
            for outcome in summary.objectives
        )
        print_status(f"{rate:.4g} requests/s: {said or f'{summary.num_requests} requests'}")
        points.append(Point(rate, seed, met, summary))
        return Probe(met, summary)

    return measure


def _report(
    suite: str,
    target: Target,
    settings: LoadSettings,
    output: Path,
    points: list[Point],
    found: MaxRate | None = None,
) -> None:
    if not points:
        return
    runs = [{"rate": one.rate, "seed": one.seed, "met": one.met, "summary": one.summary.as_dict()} for one in points]
    told = {name: value for name, value in asdict(found).items() if name != "points"} if found else {}
    document = write_document(
        output / f"{suite}.curve.json", suite, target, settings, {"max_rate": told or None, "runs": runs}
    )
    curve = [(one.rate, one.summary, one.met) for one in points]
    write_curve_html(document, curve, output, found.rate if found else None)
    print_curve(curve)
    if found:
        rate = "none" if found.rate is None else f"{found.rate:.4g} requests/s{'' if found.is_found else ' at least'}"
        print_status(f"highest rate within {', '.join(settings.slos)}: {rate} ({found.ended})")


def _rates(name: str, text: str, most: int | None = None) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or min(rates) <= 0 or (most is not None and len(rates) > most):
        remedy = "write one rate, as 5" if most == 1 else "write rates above 0, as 1,2,4"
        raise UserError(name, text, "is no rate" if most == 1 else "is no list of rates", remedy)
    return rates


def _value(value: float | None) -> str:
    return "failed requests or no sample" if value is None else f"{value:.4g}"
