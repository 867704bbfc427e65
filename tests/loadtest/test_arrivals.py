import json
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


MOONCAKE = [
    {"timestamp": at, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
    for at in (0, 0, 1500, 3000, 27482)
]


def trace_of(folder: Path, text: str) -> Path:
    file = folder / "trace.jsonl"
    file.write_bytes(text.encode())
    return file


@pytest.mark.parametrize(
    ("text", "times", "reading"),
    [
        ('100.5\n{"timestamp": 101, "x": 1}\n\n103.25\n', (0, 0.5, 2.75), "seconds"),
        ("0\n1.5\n3", (0, 1.5, 3), "seconds"),
        ("0\r\n1.5\r\n", (0, 1.5), "seconds"),
        ("\ufeff0\n1.5\n", (0, 1.5), "seconds"),
        ('{"timestamp": "0.5"}\n{"timestamp": 2}\n', (0, 1.5), "seconds"),
        (
            "\n".join(map(json.dumps, MOONCAKE)),
            (0, 0, 1.5, 3, 27.482),
            "milliseconds, as Mooncake and AIPerf write them",
        ),
        ('{"timestamp": 5, "text_input": "a"}\n{"timestamp": 505}', (0, 0.5), "milliseconds, as Mooncake and AIPerf"),
        ('{"timestamp": 5, "session_id": "a"}\n{"timestamp": 505, "session_id": "b"}', (0, 0.5), "milliseconds"),
        ('{"timestamp_ms": 5}\n{"timestamp_ms": 505}\n', (0, 0.5), "milliseconds"),
        ('{"timestamp_ns": 5}\n{"timestamp_ns": 500000005}\n', (0, 0.5), "nanoseconds"),
        ("1700000000\n1700000001.5\n", (0, 1.5), "seconds since 1970"),
        ("1700000000000\n1700000001500\n", (0, 1.5), "milliseconds since 1970"),
        ("1700000000000000\n1700000001500000\n", (0, 1.5), "microseconds since 1970"),
        ("1700000000000000000\n1700000001500000000\n", (0, 1.5), "nanoseconds since 1970"),
        ("2023-11-16 18:15:46.5\n2023-11-16T18:15:48\n", (0, 1.5), "ISO 8601"),
        ('{"timestamp": "2023-11-16T18:15:46Z"}\n{"timestamp": "2023-11-16T19:15:47.5+01:00"}', (0, 1.5), "ISO 8601"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
            "2023-11-16 18:15:48.1805900,396,109\n",
            (0, 1.5),
            "ISO 8601",
        ),
        ('"Timestamp","Model","Request tokens"\n5,ChatGPT,472\n45,GPT-4,1087\n', (0, 40), "seconds"),
        (",TIMESTAMP_MS\n0,5\n1,505\n", (0, 0.5), "milliseconds"),
        ("timestamp\n1\n2\n", (0, 1), "seconds"),
    ],
)
def test_a_trace_is_read_in_the_dialects_of_others_and_starts_at_its_first_time(
    tmp_path: Path, text: str, times: tuple[float, ...], reading: str
) -> None:
    trace = read_trace(trace_of(tmp_path, text))
    assert trace.times_s == pytest.approx(times, abs=1e-6)
    assert trace.reading.startswith(reading)


def test_the_unit_of_a_trace_can_be_given(tmp_path: Path) -> None:
    file = trace_of(tmp_path, "0\n1500\n")
    assert read_trace(file).times_s == (0, 1500)
    assert read_trace(file, "ms").times_s == (0, 1.5)
    assert read_trace(trace_of(tmp_path, "\n".join(map(json.dumps, MOONCAKE))), "s").times_s[-1] == 27482


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("3\n2\n", "trace.jsonl:2' is earlier than the line before; sort"),
        ("x\n", "has a header and no request"),
        ("a,b\n1,2\n", "trace.jsonl:2' has no `timestamp`, but a, b; name the field"),
        ('{"time": 1}\n', "trace.jsonl:1' has no `timestamp`, but time; name the field"),
        ("{}\n", "has no `timestamp`, but no field"),
        ("NaN\n", "has a header and no request"),
        ('{"timestamp": NaN}\n', "trace.jsonl:1' is a request with the timestamp nan"),
        ('{"timestamp": null}\n', "trace.jsonl:1' is a request without a timestamp"),
        ('{"timestamp": true}\n', "with the timestamp True"),
        ('{"timestamp": [1]}\n', r"with the timestamp \[1\]"),
        ('{"timestamp": 1e999}\n', "with the timestamp inf"),
        (
            '{"timestamp": 1}\n{"delay": 5, "session_id": "a"}\n',
            "trace.jsonl:2' is a request without a timestamp and the ",
        ),
        (
            '{"timestamp": 1}\n{"timestamp": "2023-11-16"}\n',
            "trace.jsonl:2' is a request with the timestamp '2023-11-16'",
        ),
        ('{"timestamp": 1}\n{"timestamp": \n', "trace.jsonl:2' is not JSON"),
        ('[{"timestamp": 1}]', "is a JSON array; write one request per line"),
        ("0.5,100\n", "with the timestamp '0.5,100'"),
        ("12:30\n", "with the timestamp '12:30'"),
        ("timestamp,x\n" + "a" * 200_000, "is not a CSV file"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_trace_of_another_form_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_trace(trace_of(tmp_path, text))


def test_a_trace_says_which_requests_and_which_fields_are_left_out(tmp_path: Path) -> None:
    trace = read_trace(trace_of(tmp_path, "\n".join(map(json.dumps, MOONCAKE))))
    assert trace.until(3) == [0, 0, 1.5]
    late, unused = trace.notes(3)
    assert late.startswith("2 of 5 requests of the trace")
    assert "at 3 s and are not sent: its last request is at 27.5 s" in late
    assert "milliseconds" in late
    assert "not its input_length, output_length, hash_ids" in unused
    assert read_trace(trace_of(tmp_path, "0\n1\n")).notes(2) == []
