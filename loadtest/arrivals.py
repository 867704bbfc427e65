"""Scheduled request times of an open loop, drawn from a seed before the run and independent of any answer.

A renewal process with mean gap 1 (constant, exponential or gamma gaps) is drawn first. Time rescaling then maps it to
seconds: request i is scheduled when the integral of the rate reaches the i-th sum of gaps. So every distribution of
gaps works with every change of the rate over time.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimserve.core.errors import UserError
from slimserve.core.text import read_text, split_lines

Arrival = Literal["constant", "poisson", "gamma"]
_NUMBER = r"(\d+(?:\.\d+)?)"
_RAMP = re.compile(rf"{_NUMBER}\.\.{_NUMBER}")
_STEP = re.compile(rf"{_NUMBER}@{_NUMBER}s?")
_RATE_SYNTAX = "write 5 (requests/s), 1..20 (linear ramp) or 5@0,20@30,5@40 (steps at these seconds)"
_TRACE_SYNTAX = 'write a number of seconds or {"timestamp": seconds} on each line'


@dataclass(frozen=True)
class Segment:
    """A period in which the rate changes linearly; times in seconds, rates in requests/s."""

    begin_s: float
    end_s: float
    begin_rate: float
    end_rate: float

    @property
    def num_expected(self) -> float:
        """Expected number of requests in the segment."""
        return (self.end_s - self.begin_s) * (self.begin_rate + self.end_rate) / 2

    def time_of(self, num_expected: float) -> float:
        """Return the time in seconds by which `num_expected` requests of this segment are expected."""
        if num_expected == 0:  # a ramp from rate 0 would divide by zero below
            return self.begin_s
        slope = (self.end_rate - self.begin_rate) / (self.end_s - self.begin_s)
        # The root of slope/2 t² + begin_rate t = num_expected, in the form without cancellation. At the end of a ramp
        # to rate 0 rounding may make its square negative.
        root = math.sqrt(max(0.0, self.begin_rate**2 + 2 * slope * num_expected))
        return min(self.begin_s + 2 * num_expected / (self.begin_rate + root), self.end_s)


def parse_rate(text: str, duration_s: float) -> list[Segment]:
    """Return the rate over `duration_s` seconds as segments; UserError if `text` is not a rate."""
    if ramp := _RAMP.fullmatch(text):
        segments = [Segment(0.0, duration_s, float(ramp[1]), float(ramp[2]))]
    elif re.fullmatch(_NUMBER, text):
        segments = [Segment(0.0, duration_s, float(text), float(text))]
    else:
        steps = [_STEP.fullmatch(part.strip()) for part in text.split(",")]
        rates = [(float(step[2]), float(step[1])) for step in steps if step]
        times = [begin_s for begin_s, _ in rates]
        if len(rates) < len(steps) or times[0] != 0 or times != sorted(set(times)):
            raise UserError("--rate", text, "is not a rate whose steps start at 0 s and ascend", _RATE_SYNTAX)
        ends = [*times[1:], math.inf]
        segments = [
            Segment(begin_s, min(end_s, duration_s), rate, rate)
            for (begin_s, rate), end_s in zip(rates, ends, strict=True)
            if begin_s < duration_s
        ]
    if not any(segment.num_expected > 0 for segment in segments):
        raise UserError("--rate", text, "is 0 throughout the run", _RATE_SYNTAX)
    return segments


def scheduled_times(
    segments: Sequence[Segment], arrival: Arrival = "poisson", burstiness: float = 1.0, seed: int = 0
) -> list[float]:
    """Return the scheduled times in seconds from the start, ascending.

    `burstiness` is the variance of gamma gaps relative to Poisson arrivals: 1 equals Poisson, larger values cluster the
    requests. With constant gaps the first request is scheduled at 0, also if the rate rises from 0: a ramp from 0 to r
    requests/s over T seconds schedules request i, from 0, at T √(2i / (r T)).
    """
    if not burstiness > 0:
        raise UserError("--burstiness", burstiness, "is not above 0", "give 1 for Poisson arrivals, more for bursts")
    gaps = _gaps(arrival, burstiness, random.Random(seed))
    times = []
    num_expected = 0.0 if arrival == "constant" else next(gaps)
    before = 0.0
    for segment in segments:
        while num_expected - before < segment.num_expected:
            times.append(segment.time_of(num_expected - before))
            num_expected += next(gaps)
        before += segment.num_expected
    return times


def _gaps(arrival: Arrival, burstiness: float, numbers: random.Random) -> Iterator[float]:
    while True:
        if arrival == "constant":
            yield 1.0
        elif arrival == "poisson":
            yield numbers.expovariate(1.0)
        else:
            yield numbers.gammavariate(1 / burstiness, burstiness)


def read_trace(file: Path, duration_s: float | None = None) -> list[float]:
    """Return the scheduled times of a recorded trace, shifted so that the first is 0 and cut at `duration_s`.

    Each line is a number of seconds or a JSON object with `timestamp` in seconds. Raises UserError for a line that is
    neither, and for times that do not ascend.
    """
    times: list[float] = []
    for number, line in enumerate(split_lines(read_text(file, "--trace", "give a text file of timestamps")), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            times.append(float(value["timestamp"] if isinstance(value, dict) else value))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError("--trace", f"{file}:{number}", "is not a timestamp", _TRACE_SYNTAX) from error
    if not times or not all(map(math.isfinite, times)) or times != sorted(times):
        raise UserError("--trace", file, "is empty or its times do not ascend", "sort it by time")
    shifted = [time - times[0] for time in times]
    return [time for time in shifted if duration_s is None or time < duration_s]
