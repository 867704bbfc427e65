"""The search for the highest rate at which a server meets its objectives, and the curve of latency over rate.

The search is pure: the caller measures. Close to the limit the result of one run is random, because percentiles of a
queue over a minute vary by a tenth or more. A rate is therefore decided by the majority of several runs. Each run has
its own seed, as the same seed would repeat prompts that the server's prefix cache knows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from slimserve.core.errors import UserError
from slimserve.loadtest.summary import LoadSummary

_GROWTH = 2.0


@dataclass(frozen=True)
class RatePoint:
    """One run at `rate` requests/s; `met` is true if it met every objective."""

    rate: float
    seed: int
    met: bool
    summary: LoadSummary


@dataclass(frozen=True)
class MaxRate:
    """The result of a search; rates in requests/s."""

    rate: float | None
    """Estimate: the geometric mean of the final bracket, or else the highest rate that met the objectives."""
    met_rate: float | None
    """Highest rate below the limit whose runs met the objectives."""
    missed_rate: float | None
    """Lowest rate above the limit whose runs missed them."""
    is_found: bool
    """True if the bracket reached the tolerance; `ended` says why the search ended."""
    ended: str
    points: tuple[RatePoint, ...]
    """All runs in the order of measurement."""


Measure = Callable[[float, int], RatePoint]
"""Runs one load at a rate in requests/s with a seed."""


def find_max_rate(
    measure: Measure,
    start_rate: float,
    tolerance: float = 0.03,
    repeats: int = 3,
    *,
    lowest_rate: float = 0.01,
    highest_rate: float = 10_000.0,
    first_seed: int = 0,
) -> MaxRate:
    """Bracket the limit by doubling or halving from `start_rate`, then halve the bracket on a logarithmic scale.

    The search ends when the rates that met and missed are within `tolerance` of each other. A rate meets the objectives
    if most of `repeats` runs do; runs that cannot change the majority are skipped. An invalid run (`summary.invalid`)
    ends the search with the results so far. Raises UserError for settings with which no search can end.
    """
    if not 0 < lowest_rate <= start_rate <= highest_rate:
        limits = f"give a rate from {lowest_rate:g} to {highest_rate:g} requests/s"
        raise UserError("--rate", start_rate, "cannot start a search", limits)
    if tolerance <= 0 or repeats < 1:
        raise UserError(
            "search", (tolerance, repeats), "never ends", "give a tolerance above 0 and at least one repeat"
        )
    seeds = itertools.count(first_seed)
    points: list[RatePoint] = []
    met_rate = missed_rate = None
    rate = start_rate
    try:
        while met_rate is None or missed_rate is None or missed_rate > met_rate * (1 + tolerance):
            if _is_met(measure, rate, repeats, seeds, points):
                met_rate = rate
            else:
                missed_rate = rate
            if missed_rate is None and rate == highest_rate:
                return MaxRate(rate, rate, None, False, f"met at {rate:g}/s, the highest rate allowed", tuple(points))
            if met_rate is None and rate == lowest_rate:
                return MaxRate(None, None, rate, False, f"missed even at {rate:g}/s, the lowest rate", tuple(points))
            if missed_rate is None:
                rate = min(rate * _GROWTH, highest_rate)
            elif met_rate is None:
                rate = max(rate / _GROWTH, lowest_rate)
            else:
                rate = math.sqrt(met_rate * missed_rate)
    except _InvalidRunError as error:
        return MaxRate(met_rate, met_rate, missed_rate, False, str(error), tuple(points))
    ended = f"met at {met_rate:.4g}/s, missed at {missed_rate:.4g}/s"
    return MaxRate(rate, met_rate, missed_rate, True, ended, tuple(points))


def sweep(measure: Measure, rates: Iterable[float], first_seed: int = 0) -> list[RatePoint]:
    """Run once at each rate in ascending order, each time with another seed."""
    return [measure(rate, seed) for seed, rate in enumerate(sorted(rates), first_seed)]


class _InvalidRunError(Exception):
    """A run did not measure the server; the message gives the reason."""


def _is_met(measure: Measure, rate: float, repeats: int, seeds: Iterator[int], points: list[RatePoint]) -> bool:
    """Return the result of the majority of runs at a rate; each run is appended to `points`."""
    counts = {True: 0, False: 0}
    while 2 * max(counts.values()) <= repeats and sum(counts.values()) < repeats:
        point = measure(rate, next(seeds))
        points.append(point)
        if point.summary.invalid:
            raise _InvalidRunError(f"the run at {rate:.4g}/s was not valid: {'; '.join(point.summary.invalid)}")
        counts[point.met] += 1
    return counts[True] > counts[False]
