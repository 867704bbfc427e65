import pytest

from slimserve.core.errors import UserError
from slimserve.loadtest.calibrate import calibrate, compare
from slimserve.loadtest.mock_server import MockSchedule
from slimserve.loadtest.rows import Row

SCHEDULE = MockSchedule(ttft_s=0.1, gap_s=0.02, num_tokens=3)


def row(ttft_s: float, gaps_s: tuple[float, ...], end_s: float) -> Row:
    times = [ttft_s]
    for gap_s in gaps_s:
        times.append(times[-1] + gap_s)
    return Row(scheduled_s=0.0, sent_s=0.0, end_s=end_s, arrivals=tuple((at_s, 1) for at_s in times))


def test_each_sample_is_compared_with_its_scheduled_time() -> None:
    errors = compare([row(0.101, (0.02, 0.025), 0.146)], SCHEDULE)
    assert errors == pytest.approx(
        {
            "num_requests": 1,
            "ttft_p50_error_ms": 1.0,
            "ttft_p99_error_ms": 1.0,
            "itl_p50_error_ms": 0.0,
            "itl_p99_error_ms": 5.0,
            "e2e_p50_error_ms": 6.0,
            "e2e_p99_error_ms": 6.0,
        },
        abs=1e-6,
    )


def test_early_and_late_errors_do_not_cancel() -> None:
    errors = compare([row(0.098, (0.02, 0.02), 0.14), row(0.102, (0.02, 0.02), 0.14)], SCHEDULE)
    assert errors["ttft_p50_error_ms"] == pytest.approx(2.0)


def test_a_calibration_without_samples_is_an_error() -> None:
    with pytest.raises(UserError, match="calibrate"):
        compare([], SCHEDULE)


def test_the_client_measures_to_within_a_few_milliseconds() -> None:
    # The best of three tries, with bounds for a busy test machine; an idle one reaches a tenth of a millisecond.
    tries = (calibrate(num_streams=4, tokens_per_s=50, seconds=2) for _ in range(3))
    best = next((each for each in tries if each.e2e_p50_error_ms < 10 and each.itl_p50_error_ms < 5), None)
    assert best is not None
    assert best.num_requests >= 4
    assert best.ttft_p50_error_ms < 5
    assert set(best.as_dict()) >= {"ttft_p99_error_ms", "itl_p99_error_ms", "e2e_p99_error_ms", "server_lag_p99_ms"}
