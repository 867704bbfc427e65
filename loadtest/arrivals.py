"""When requests are due, drawn before the run from a seed: a schedule that waits for no answer.

A renewal process of mean gap 1 (equal, exponential or gamma gaps) gives the number of expected requests at which each
one is due; a rate over time turns that number into seconds (time rescaling: the i-th request is due when the integral
of the rate reaches the i-th sum of gaps). So every kind of gap goes with every course of the rate.
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

Arrival = Literal["constant", "poisson", "gamma"]
_NUMBER = r"(\d+(?:\.\d+)?)"
_RAMP = re.compile(rf"{_NUMBER}\.\.{_NUMBER}")
_STEP = re.compile(rf"{_NUMBER}@{_NUMBER}s?")
_RATE_SYNTAX = "write 5 (requests/s), 1..20 (rising evenly) or 5@0,20@30,5@40 (from these seconds on)"


@dataclass(frozen=True)
class Segment:
    """A stretch of time over which the rate changes evenly; seconds and requests/s."""

    begin_s: float
    end_s: float
    begin_rate: float
    end_rate: float

    @property
    def num_expected(self) -> float:
        return (self.end_s - self.begin_s) * (self.begin_rate + self.end_rate) / 2

    def time_of(self, num_expected: float) -> float:
        """When so many requests of this segment are expected to have come."""
        slope = (self.end_rate - self.begin_rate) / (self.end_s - self.begin_s)
        # The root of slope/2 t² + begin_rate t = num_expected, in the form that does not cancel.
        root = math.sqrt(self.begin_rate**2 + 2 * slope * num_expected)
        return self.begin_s + 2 * num_expected / (self.begin_rate + root)


def parse_rate(text: str, duration_s: float) -> list[Segment]:
    """The course of the rate over `duration_s` seconds; UserError where the text is none."""
    if ramp := _RAMP.fullmatch(text):
        segments = [Segment(0.0, duration_s, float(ramp[1]), float(ramp[2]))]
    elif re.fullmatch(_NUMBER, text):
        segments = [Segment(0.0, duration_s, float(text), float(text))]
    else:
        steps = [_STEP.fullmatch(part.strip()) for part in text.split(",")]
        rates = [(float(step[2]), float(step[1])) for step in steps if step]
        times = [begin_s for begin_s, _ in rates]
        if len(rates) < len(steps) or times[0] != 0 or times != sorted(set(times)):
            raise UserError("--rate", text, "does not begin at 0 s and go on in time", _RATE_SYNTAX)
        ends = [*times[1:], math.inf]
        segments = [
            Segment(begin_s, min(end_s, duration_s), rate, rate)
            for (begin_s, rate), end_s in zip(rates, ends, strict=True)
            if begin_s < duration_s
        ]
    if not any(segment.num_expected > 0 for segment in segments):
        raise UserError("--rate", text, "makes no load", _RATE_SYNTAX)
    return segments


def scheduled_times(
    segments: Sequence[Segment], arrival: Arrival = "poisson", burstiness: float = 1.0, seed: int = 0
) -> list[float]:
    """Seconds from the start at which requests are due, ascending.

    `burstiness` is the variance of gamma gaps over that of Poisson arrivals: 1 is Poisson, more comes in bursts. With
    constant gaps the first request is due at once.
    """
    if not burstiness > 0:
        raise UserError("--burstiness", burstiness, "is not above 0", "give 1 for Poisson arrivals, more for bursts")
    gaps = _gaps(arrival, burstiness, random.Random(seed))
    due = []
    num_expected = 0.0 if arrival == "constant" else next(gaps)
    before = 0.0
    for segment in segments:
        while num_expected - before < segment.num_expected:
            due.append(segment.time_of(num_expected - before))
            num_expected += next(gaps)
        before += segment.num_expected
    return due


def _gaps(arrival: Arrival, burstiness: float, numbers: random.Random) -> Iterator[float]:
    while True:
        if arrival == "constant":
            yield 1.0
        elif arrival == "poisson":
            yield numbers.expovariate(1.0)
        else:
            yield numbers.gammavariate(1 / burstiness, burstiness)


def read_trace(file: Path, duration_s: float | None = None) -> list[float]:
    """Due times of a recorded trace: one timestamp a line, a number or a JSON object with `timestamp`, in seconds.

    The first one becomes 0. Raises UserError where a line is neither or time goes back.
    """
    times: list[float] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--trace", file, f"cannot be read ({error})", "give a text file of timestamps") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            times.append(float(value["timestamp"] if isinstance(value, dict) else value))
        except (ValueError, KeyError, TypeError) as error:
            remedy = 'write a number of seconds or {"timestamp": seconds} on each line'
            raise UserError("--trace", f"{file}:{number}", "is no timestamp", remedy) from error
    if not times or not all(map(math.isfinite, times)) or times != sorted(times):
        raise UserError("--trace", file, "does not go forward in time, or is empty", "sort it by time")
    due = [time - times[0] for time in times]
    return [time for time in due if duration_s is None or time < duration_s]
