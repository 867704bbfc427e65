"""Tests of the search against an M/D/1 queue in virtual time, whose highest rate is known in closed form."""

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import numpy as np
import pytest

from slimserve.core.errors import UserError
from slimserve.loadtest.arrivals import parse_rate, scheduled_times
from slimserve.loadtest.rows import Row
from slimserve.loadtest.search import RatePoint, find_max_rate, sweep
from slimserve.loadtest.slo import parse_objective
from slimserve.loadtest.summary import LoadSummary, summarize

_SERVICE_S = 0.01
_WARMUP_S, _WINDOW_S = 5.0, 60.0
_EMPTY = summarize([], 0.0, 1.0)


def wait_cdf(rate: float, service_s: float, wait_s: float) -> float:
    """Return P(wait <= wait_s) in an M/D/1 queue (Erlang 1909), in 100 digits because large terms cancel."""
    with localcontext() as context:
        context.prec = 100
        exact_rate, exact_service, exact_wait = Decimal(rate), Decimal(service_s), Decimal(wait_s)
        total = Decimal(0)
        for k in range(int(exact_wait / exact_service) + 1):
            u = exact_rate * (exact_wait - k * exact_service)
            total += (Decimal(1) if k == 0 else (-u) ** k) / math.factorial(k) * u.exp()
        return float((1 - exact_rate * exact_service) * total)


def analytic_max_rate(service_s: float, latency_s: float, frac: float) -> float:
    """Return the rate at which the percentile of waiting plus service time is `latency_s`."""
    low, high = 0.0, 1 / service_s
    for _ in range(50):
        middle = (low + high) / 2
        if wait_cdf(middle, service_s, latency_s - service_s) >= frac:
            low = middle
        else:
            high = middle
    return low


def waits_s(scheduled_s: np.ndarray, service_s: float) -> np.ndarray:
    """Return the waiting time of each arrival (Lindley 1952, unrolled: work that arrived minus idle time)."""
    backlog = np.concatenate([[0.0], np.cumsum(service_s - np.diff(scheduled_s))])
    return np.asarray(backlog - np.minimum.accumulate(backlog))


def queue(objective: str) -> Callable[[float, int], RatePoint]:
    """Simulate one minute of the queue with this project's arrivals, rows and objectives."""
    parsed = parse_objective(objective)

    def measure(rate: float, seed: int) -> RatePoint:
        scheduled_s = np.array(scheduled_times(parse_rate(f"{rate:f}", _WARMUP_S + _WINDOW_S), "poisson", seed=seed))
        ends_s = scheduled_s + waits_s(scheduled_s, _SERVICE_S) + _SERVICE_S
        rows = [Row(at_s, at_s, end) for at_s, end in zip(scheduled_s, ends_s, strict=True) if at_s >= _WARMUP_S]
        return RatePoint(rate, seed, parsed.evaluate(rows).is_met, _EMPTY)

    return measure


def step(limit: float, invalid_from: float = math.inf) -> Callable[[float, int], RatePoint]:
    """Return a deterministic server that meets its objectives up to `limit`."""
    faulty = LoadSummary(**{**_EMPTY.__dict__, "invalid": ["the client was late"]})
    return lambda rate, seed: RatePoint(rate, seed, rate <= limit, faulty if rate >= invalid_from else _EMPTY)


@pytest.mark.parametrize("rate", [30.0, 76.0, 90.0])
def test_the_analytic_distribution_equals_that_of_a_long_simulation(rate: float) -> None:
    numbers = np.random.default_rng(5)
    simulated = waits_s(np.cumsum(numbers.exponential(1 / rate, 1_000_000)), _SERVICE_S)
    for wait_s in (0.0, 0.004, 0.015, 0.04, 0.12):
        assert np.mean(simulated <= wait_s + 1e-9) == pytest.approx(wait_cdf(rate, _SERVICE_S, wait_s), abs=0.006)


@pytest.mark.parametrize(
    ("objective", "latency_s", "frac"), [("e2e_p90=50ms", 0.05, 0.9), ("e2e_p99=100ms", 0.1, 0.99)]
)
@pytest.mark.parametrize("seed", range(5))
def test_the_highest_rate_of_a_queue_is_found_within_5_percent(
    objective: str, latency_s: float, frac: float, seed: int
) -> None:
    result = find_max_rate(queue(objective), start_rate=10.0, first_seed=1000 * seed)
    assert result.is_found
    assert result.rate == pytest.approx(analytic_max_rate(_SERVICE_S, latency_s, frac), rel=0.05)
    assert len(result.points) <= 30, "each run takes a minute"


@pytest.mark.parametrize("start_rate", [0.02, 1.0, 36.9, 37.1, 5000.0])
def test_the_bracket_closes_around_a_sharp_limit_from_any_start_rate(start_rate: float) -> None:
    result = find_max_rate(step(37.0), start_rate, tolerance=0.01)
    assert result.met_rate is not None
    assert result.missed_rate is not None
    assert result.rate is not None
    assert result.met_rate <= 37.0 < result.missed_rate <= result.met_rate * 1.01
    assert result.met_rate < result.rate < result.missed_rate


def test_every_run_has_its_own_seed_and_no_run_is_made_after_the_majority_is_certain() -> None:
    verdicts = iter([True, False, True] + [False, False] + [True] * 100)
    result = find_max_rate(
        lambda rate, seed: RatePoint(rate, seed, next(verdicts), _EMPTY), 8.0, tolerance=0.5, first_seed=7
    )
    assert [(point.rate, point.met) for point in result.points[:6]] == [
        *((8.0, True), (8.0, False), (8.0, True)),
        *((16.0, False), (16.0, False)),
        (pytest.approx(8 * 2**0.5), True),
    ]
    assert [point.seed for point in result.points] == list(range(7, 7 + len(result.points)))


def test_a_server_that_meets_the_highest_allowed_rate_is_reported_as_such() -> None:
    result = find_max_rate(step(1e9), 3.0, highest_rate=20.0)
    assert (result.rate, result.missed_rate, result.is_found) == (20.0, None, False)
    assert "highest rate allowed" in result.ended


def test_a_server_that_misses_at_every_rate_is_reported_as_such() -> None:
    result = find_max_rate(step(0.0), 3.0, lowest_rate=0.5)
    assert (result.rate, result.missed_rate, result.is_found) == (None, 0.5, False)
    assert "missed even at 0.5/s" in result.ended
    assert [point.rate for point in result.points] == [3.0, 3.0, 1.5, 1.5, 0.75, 0.75, 0.5, 0.5]


def test_an_invalid_run_ends_the_search_with_the_results_so_far() -> None:
    result = find_max_rate(step(100.0, invalid_from=30.0), 10.0)
    assert (result.rate, result.is_found) == (20.0, False)
    assert result.ended == "the run at 40/s was not valid: the client was late"
    assert result.points[-1].summary.invalid


def test_a_sweep_runs_in_ascending_order_and_returns_every_run() -> None:
    points = sweep(step(3.0), [4.0, 1.0, 2.0], first_seed=5)
    assert [(point.rate, point.seed, point.met) for point in points] == [
        (1.0, 5, True),
        (2.0, 6, True),
        (4.0, 7, False),
    ]


@pytest.mark.parametrize("settings", [{"start_rate": 0.0}, {"start_rate": 1e6}, {"tolerance": 0.0}, {"repeats": 0}])
def test_settings_with_which_no_search_can_end_are_rejected(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match="give a"):
        find_max_rate(step(1.0), **{"start_rate": 1.0, **settings})  # type: ignore[arg-type]
