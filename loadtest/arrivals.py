"""Scheduled request times of an open loop, drawn from a seed before the run and independent of any answer.

A renewal process with mean gap 1 (constant, exponential or gamma gaps) is drawn first. Time rescaling then maps it to
seconds: request i is scheduled when the integral of the rate reaches the i-th sum of gaps. So every distribution of
gaps works with every change of the rate over time.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from slimserve.core.errors import UserError
from slimserve.core.text import read_text, split_lines

Arrival = Literal["constant", "poisson", "gamma"]
_NUMBER = r"(\d+(?:\.\d+)?)"
_RAMP = re.compile(rf"{_NUMBER}\.\.{_NUMBER}")
_STEP = re.compile(rf"{_NUMBER}@{_NUMBER}s?")
_RATE_SYNTAX = "write 5 (requests/s), 1..20 (linear ramp) or 5@0,20@30,5@40 (steps at these seconds)"
_TRACE_SYNTAX = 'write a number, an ISO 8601 time or {"timestamp": …} on each line, or a CSV file with such a column'
_TIME_FIELD = "timestamp"
_FIELD = re.compile(r"timestamp(?:_(s|ms|us|ns))?")
_HEADER = re.compile(r"[^\d\s{\[-][^:]*$")
"""First line of a CSV file: it does not begin like a number or a time."""
TraceUnit = Literal["auto", "s", "ms", "us", "ns"]
_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_SECONDS = {"seconds": 1.0, "milliseconds": 1e-3, "microseconds": 1e-6, "nanoseconds": 1e-9}
_EPOCH_S = 1e9
"""September 2001 in seconds since 1970; no trace lasts that long."""
_MILLISECOND_FIELDS = {"hash_ids", "input_length", "output_length", "text_input", "text_inputs", "session_id", "delay"}
"""Fields of the requests of Mooncake's and AIPerf's traces."""


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


@dataclass(frozen=True)
class Trace:
    """The recorded times of requests."""

    file: Path
    times_s: tuple[float, ...]
    """Time of each request in seconds, ascending from 0."""
    reading: str
    """Unit and form in which the times were read, such as `milliseconds, as Mooncake and AIPerf write them`."""
    unused: tuple[str, ...]
    """Names of the other fields."""

    def until(self, duration_s: float) -> list[float]:
        """Return the times before `duration_s`."""
        return [time for time in self.times_s if time < duration_s]

    def notes(self, duration_s: float) -> list[str]:
        """Return a sentence for each part of the trace that a load of `duration_s` seconds leaves out."""
        notes = []
        num_late = len(self.times_s) - len(self.until(duration_s))
        if num_late:
            notes.append(
                f"{num_late:,} of {len(self.times_s):,} requests of the trace {self.file} come after the end of the "
                f"load at {duration_s:g} s and are not sent: its last request is at {self.times_s[-1]:,.1f} s. Give a "
                f"longer --duration, or --trace-unit if its times are not {self.reading}"
            )
        if self.unused:
            names = ", ".join(self.unused[:5]) + (", …" if len(self.unused) > 5 else "")
            notes.append(
                f"only the times of the trace {self.file} are used, not its {names}: the suite makes the requests"
            )
        return notes


def read_trace(file: Path, unit: TraceUnit = "auto") -> Trace:
    """Return the recorded times of a trace, shifted so that the first is 0.

    A line is a number or an ISO 8601 timestamp, a JSON object with a `timestamp`, or a row of a CSV file with a column
    `timestamp`. Numbers are in `unit`; "auto" reads the unit from the field's name (`timestamp_ms`), from the dialect
    (Mooncake and AIPerf write milliseconds) or from the size of a time since 1970, and otherwise means seconds. Raises
    UserError that names the line for one that is none of these, and for times that do not ascend.
    """
    lines = split_lines(read_text(file, "--trace", "give a text file of timestamps"))
    rows = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError("--trace", file, "is empty", _TRACE_SYNTAX)
    is_table = _HEADER.match(rows[0][1]) is not None
    entries = _parse_table(file, rows) if is_table else [(at, _parse_line(file, at, line)) for at, line in rows]
    field = _time_field(file, *entries[0])
    reading = _reading_of(field, entries[0][1], unit)
    times: list[float] = []
    for number, entry in entries:
        time = _seconds(file, number, entry, field, reading)
        if times and time < times[-1]:
            raise UserError("--trace", f"{file}:{number}", "is earlier than the line before", "sort the trace by time")
        times.append(time)
    unused = tuple(name for name in entries[0][1] if name != field)
    return Trace(file, tuple(time - times[0] for time in times), reading, unused)


def _parse_line(file: Path, number: int, line: str) -> dict[str, Any]:
    if line[0] not in "{[":
        return {_TIME_FIELD: line}
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError("--trace", f"{file}:{number}", f"is not JSON ({error})", _TRACE_SYNTAX) from error
    if isinstance(entry, list):
        problem = "is a JSON array"
        raise UserError("--trace", f"{file}:{number}", problem, "write one request per line, as `jq -c '.[]'` does")
    return entry if isinstance(entry, dict) else {_TIME_FIELD: entry}


def _parse_table(file: Path, rows: Sequence[tuple[int, str]]) -> list[tuple[int, dict[str, Any]]]:
    separator = "\t" if "\t" in rows[0][1] else ","
    try:
        header, *others = csv.reader((line for _, line in rows), delimiter=separator)
    except csv.Error as error:
        raise UserError("--trace", file, f"is not a CSV file ({error})", _TRACE_SYNTAX) from error
    if not others:
        raise UserError("--trace", file, "has a header and no request", _TRACE_SYNTAX)
    return [
        (number, dict(zip(header, cells, strict=False))) for (number, _), cells in zip(rows[1:], others, strict=False)
    ]


def _time_field(file: Path, number: int, entry: Mapping[str, Any]) -> str:
    field = next((name for name in entry if _FIELD.fullmatch(name.strip().lower())), None)
    if field is None:
        problem = f"has no `timestamp`, but {', '.join(entry) or 'no field'}"
        raise UserError("--trace", f"{file}:{number}", problem, "name the field of the time `timestamp`")
    return field


def _reading_of(field: str, entry: Mapping[str, Any], unit: TraceUnit) -> str:
    """Return the unit of the times, and why, in words that begin with the unit's name."""
    value = _number(entry[field])
    if value is None:
        return "ISO 8601"
    if unit != "auto":
        return _UNIT_NAMES[unit]
    if suffix := _FIELD.fullmatch(field.strip().lower())[1]:  # type: ignore[index]
        return _UNIT_NAMES[suffix]
    if value >= _EPOCH_S:
        power = min(3, int(math.log10(value / _EPOCH_S) / 3))
        return f"{list(_UNIT_NAMES.values())[power]} since 1970"
    if not _MILLISECOND_FIELDS.isdisjoint(entry):
        return "milliseconds, as Mooncake and AIPerf write them"
    return "seconds"


def _seconds(file: Path, number: int, entry: Mapping[str, Any], field: str, reading: str) -> float:
    value = entry.get(field)
    time = _number(value)
    if time is not None and reading != "ISO 8601":
        return time * _SECONDS[re.split(r"\W", reading)[0]]
    if isinstance(value, str) and time is None and reading == "ISO 8601":
        with contextlib.suppress(ValueError):
            moment = datetime.fromisoformat(value.strip())
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    shown = "without a timestamp" if value is None else f"with the timestamp {value!r}"
    others = [name for name in entry if name != field]
    names = f" and the fields {', '.join(others[:5])}" if others else ""
    raise UserError("--trace", f"{file}:{number}", f"is a request {shown}{names}", _TRACE_SYNTAX)


def _number(value: object) -> float | None:
    """Return a finite number, also one in a text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
