import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from slimserve.core.errors import UserError
from slimserve.loadtest.arrivals import Segment, parse_rate, read_trace, scheduled_times


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


@pytest.mark.parametrize("text", ["1..9", "9..1", "2@0,10@3,4@7", "0@0,5@5"])
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
