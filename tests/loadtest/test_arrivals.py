import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from slimserve.core.errors import UserError
from slimserve.loadtest.arrivals import Arrival, Segment, parse_rate, read_trace, scheduled_times


def test_constant_arrivals_are_evenly_spaced_from_the_start() -> None:
    assert scheduled_times(parse_rate("4", 2.0), "constant") == pytest.approx(
        [0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    )


@pytest.mark.parametrize(
    ("arrival", "burstiness", "cv2"), [("poisson", 1.0, 1.0), ("gamma", 4.0, 4.0), ("gamma", 0.25, 0.25)]
)
def test_gaps_have_the_requested_mean_and_variance(arrival: str, burstiness: float, cv2: float) -> None:
    times = scheduled_times(parse_rate("50", 2000.0), arrival, burstiness, seed=3)  # type: ignore[arg-type]
    gaps = [after - before for before, after in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.02, rel=0.03)
    assert statistics.variance(gaps) / statistics.mean(gaps) ** 2 == pytest.approx(cv2, rel=0.06)


@pytest.mark.parametrize(("end_rate", "duration_s"), [("20", 10.0), ("20", 67.0), ("0.3", 30.0), ("7", 3.7)])
def test_a_ramp_from_zero_with_constant_gaps_has_its_closed_form(end_rate: str, duration_s: float) -> None:
    times = scheduled_times(parse_rate(f"0..{end_rate}", duration_s), "constant")
    num_requests = math.ceil(float(end_rate) * duration_s / 2)
    slope = float(end_rate) / duration_s
    assert times == pytest.approx([math.sqrt(2 * number / slope) for number in range(num_requests)])


@pytest.mark.parametrize("arrival", ["constant", "poisson", "gamma"])
def test_a_ramp_to_zero_ends_in_time_whatever_its_length(arrival: Arrival) -> None:
    for tenths in range(1, 400):
        duration_s = tenths / 10
        times = scheduled_times(parse_rate("13.7..0", duration_s), arrival, seed=tenths)
        assert times == sorted(times)
        assert all(0 <= at_s <= duration_s for at_s in times)
        if arrival == "constant":
            assert len(times) == math.ceil(13.7 * duration_s / 2)


def test_the_root_at_the_very_end_of_a_ramp_to_zero_is_not_negative() -> None:
    for tenths in range(1, 400):
        ramp = Segment(0.0, tenths / 10, 13.7, 0.0)
        assert ramp.time_of(ramp.num_expected) == pytest.approx(ramp.end_s, rel=1e-6)


@pytest.mark.parametrize("text", ["1..9", "9..1", "0..20", "20..0", "2@0,10@3,4@7", "0@0,5@5"])
def test_the_number_of_scheduled_requests_follows_the_integral_of_the_rate(text: str) -> None:
    segments = parse_rate(text, 10.0)
    times = scheduled_times(segments, "constant")

    def expected(at_s: float, steps: int = 20000) -> float:  # by brute force
        width = at_s / steps
        return sum(rate(segments, (step + 0.5) * width) * width for step in range(steps))

    for at_s in (0.7, 2.9, 3.1, 6.95, 9.99):
        assert abs(sum(time < at_s for time in times) - expected(at_s)) <= 1.01
    assert times == sorted(times)
    assert all(0 <= time < 10 for time in times)


def rate(segments: list[Segment], at_s: float) -> float:
    for part in segments:
        if part.begin_s <= at_s < part.end_s:
            share = (at_s - part.begin_s) / (part.end_s - part.begin_s)
            return part.begin_rate + share * (part.end_rate - part.begin_rate)
    return 0.0


def test_the_seed_determines_the_schedule() -> None:
    segments = parse_rate("5", 20)
    assert scheduled_times(segments, seed=1) == scheduled_times(segments, seed=1) != scheduled_times(segments, seed=2)


@pytest.mark.parametrize("text", ["", "x", "-1", "5..", "5@1", "5@0,6@0", "5@0,6@9,7@3", "0", "1e3", "nan"])
def test_an_invalid_rate_is_rejected_with_the_syntax(text: str) -> None:
    with pytest.raises(UserError, match="requests/s"):
        parse_rate(text, 10.0)


def test_a_trace_starts_at_its_first_timestamp(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('100.5\n{"timestamp": 101, "x": 1}\n\n103.25\n')
    assert read_trace(trace) == [0, 0.5, 2.75]
    assert read_trace(trace, duration_s=1.0) == [0, 0.5]
    for text in ("", "3\n2\n", "x\n", '{"time": 1}\n', "NaN\n"):
        trace.write_text(text)
        with pytest.raises(UserError, match="trace"):
            read_trace(trace)
