"""The search against an M/D/1 queue in virtual time, whose highest rate is known in closed form."""

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
        rows = [Row(due, due, end) for due, end in zip(scheduled_s, ends_s, strict=True) if due >= _WARMUP_S]
        return RatePoint(rate, seed, parsed.evaluate(rows).is_met, _EMPTY)

    return measure


def step(limit: float, invalid_from: float = math.inf) -> Callable[[float, int], RatePoint]:
    """A deterministic server that meets its objectives up to `limit`."""
    faulty = LoadSummary(**{**_EMPTY.__dict__, "invalid": ["the client was late"]})
    return lambda rate, seed: RatePoint(rate, seed, rate <= limit, faulty if rate >= invalid_from else _EMPTY)


@pytest.mark.parametrize("rate", [30.0, 76.0, 90.0])
def test_the_analytic_distribution_is_that_of_a_long_simulation(rate: float) -> None:
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
    found = find_max_rate(queue(objective), start_rate=10.0, first_seed=1000 * seed)
    assert found.is_found
    assert found.rate == pytest.approx(analytic_max_rate(_SERVICE_S, latency_s, frac), rel=0.05)
    assert len(found.points) <= 30, "a person waits a minute for each"


@pytest.mark.parametrize("start_rate", [0.02, 1.0, 36.9, 37.1, 5000.0])
def test_the_bracket_closes_around_a_sharp_limit_from_wherever_it_begins(start_rate: float) -> None:
    found = find_max_rate(step(37.0), start_rate, tolerance=0.01)
    assert found.met_rate is not None
    assert found.missed_rate is not None
    assert found.rate is not None
    assert found.met_rate <= 37.0 < found.missed_rate <= found.met_rate * 1.01
    assert found.met_rate < found.rate < found.missed_rate


def test_every_run_has_a_seed_of_its_own_and_none_is_made_once_the_verdict_is_certain() -> None:
    verdicts = iter([True, False, True] + [False, False] + [True] * 100)
    found = find_max_rate(
        lambda rate, seed: RatePoint(rate, seed, next(verdicts), _EMPTY), 8.0, tolerance=0.5, first_seed=7
    )
    assert [(point.rate, point.met) for point in found.points[:6]] == [
        *((8.0, True), (8.0, False), (8.0, True)),
        *((16.0, False), (16.0, False)),
        (pytest.approx(8 * 2**0.5), True),
    ]
    assert [point.seed for point in found.points] == list(range(7, 7 + len(found.points)))


def test_a_server_beyond_what_may_be_asked_is_said_to_be() -> None:
    found = find_max_rate(step(1e9), 3.0, highest_rate=20.0)
    assert (found.rate, found.missed_rate, found.is_found) == (20.0, None, False)
    assert "highest rate allowed" in found.ended


def test_a_server_that_misses_at_any_rate_is_said_to() -> None:
    found = find_max_rate(step(0.0), 3.0, lowest_rate=0.5)
    assert (found.rate, found.missed_rate, found.is_found) == (None, 0.5, False)
    assert "missed even at 0.5/s" in found.ended
    assert [point.rate for point in found.points] == [3.0, 3.0, 1.5, 1.5, 0.75, 0.75, 0.5, 0.5]


def test_a_run_that_measured_the_client_ends_the_search_with_what_was_found() -> None:
    found = find_max_rate(step(100.0, invalid_from=30.0), 10.0)
    assert (found.rate, found.is_found) == (20.0, False)
    assert found.ended == "the run at 40/s was not valid: the client was late"
    assert found.points[-1].summary.invalid


def test_a_sweep_goes_up_and_keeps_every_run() -> None:
    points = sweep(step(3.0), [4.0, 1.0, 2.0], first_seed=5)
    assert [(point.rate, point.seed, point.met) for point in points] == [
        (1.0, 5, True),
        (2.0, 6, True),
        (4.0, 7, False),
    ]


@pytest.mark.parametrize("settings", [{"start_rate": 0.0}, {"start_rate": 1e6}, {"tolerance": 0.0}, {"repeats": 0}])
def test_a_search_that_cannot_end_is_not_begun(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match="give a"):
        find_max_rate(step(1.0), **{"start_rate": 1.0, **settings})  # type: ignore[arg-type]
