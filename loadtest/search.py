"""The highest rate at which a server keeps its objectives, and the curve of latency over rate.

Pure search: the caller measures. Close to the limit a run's verdict is a matter of luck, as a queue's percentiles over
a minute scatter by a tenth and more; so a rate is judged by the majority of several runs, each with a seed of its own
(the same seed would also ask the same prompts, which the server's prefix cache then knows).
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
class Probe:
    """One run's outcome."""

    met: bool
    """Whether every objective was kept."""
    summary: LoadSummary


@dataclass(frozen=True)
class RatePoint:
    """One run of a search, at `rate` requests/s."""

    rate: float
    seed: int
    met: bool
    summary: LoadSummary


@dataclass(frozen=True)
class MaxRate:
    """What a search found; rates in requests/s."""

    rate: float | None
    """The estimate: the geometric mean of the bracket where it closed, else the highest rate that met."""
    met_rate: float | None
    """The highest rate below the limit whose runs met the objectives."""
    missed_rate: float | None
    """The lowest rate above it whose runs missed them."""
    is_found: bool
    """Whether the bracket closed to the tolerance; else `ended` says what stood in the way."""
    ended: str
    points: tuple[RatePoint, ...]
    """Every run, in the order measured."""


Measure = Callable[[float, int], Probe]
"""Runs one load of so many requests/s with a seed."""


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

    Ends when the rates that met and missed are within `tolerance` of each other. A rate meets its objectives where most
    of `repeats` runs do; no further run is made once that is certain. A run whose figures are not the server's
    (`summary.invalid`) ends the search with what was found until then. Raises UserError for settings that cannot be
    searched with.
    """
    if not 0 < lowest_rate <= start_rate <= highest_rate:
        limits = f"give a rate from {lowest_rate:g} to {highest_rate:g} requests/s"
        raise UserError("--rate", start_rate, "is no rate to begin the search at", limits)
    if tolerance <= 0 or repeats < 1:
        raise UserError(
            "search", (tolerance, repeats), "cannot end", "give a tolerance above 0 and at least one repeat"
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
    """One run at each rate, in ascending order, each with a seed of its own."""
    points = []
    for seed, rate in enumerate(sorted(rates), first_seed):
        probe = measure(rate, seed)
        points.append(RatePoint(rate, seed, probe.met, probe.summary))
    return points


class _InvalidRunError(Exception):
    """A run measured something else than the server; the message says what."""


def _is_met(measure: Measure, rate: float, repeats: int, seeds: Iterator[int], points: list[RatePoint]) -> bool:
    """The verdict of most runs at a rate; each is appended to `points`."""
    counts = {True: 0, False: 0}
    while 2 * max(counts.values()) <= repeats and sum(counts.values()) < repeats:
        seed = next(seeds)
        probe = measure(rate, seed)
        points.append(RatePoint(rate, seed, probe.met, probe.summary))
        if probe.summary.invalid:
            raise _InvalidRunError(f"the run at {rate:.4g}/s was not valid: {'; '.join(probe.summary.invalid)}")
        counts[probe.met] += 1
    return counts[True] > counts[False]
