"""Compare the rate that `--find-max-rate` reports with the analytic maximum rate of a queue, for five seeds.

    make bench-max-rate

The mock server (loadtest/mock_server.py) serves Poisson arrivals one at a time, 2 ms each: an M/D/1 queue. The
objective is an end-to-end p90 of 10 ms, which holds up to a load of 76%. The distribution of the waiting time is
Erlang's (1909). The spread of p90 limits such a search, so the service time is short: 10 s at 2 ms hold as many
requests as 10 minutes at 120 ms. The last line of output is one JSON object. The benchmark takes about 25 minutes;
`--quick` runs one seed.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

from slimserve.core.hardware import probe_hardware
from slimserve.core.openai_client import Target
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.loadtest.mock_server import MODEL, MockSchedule, running_mock_server
from slimserve.loadtest.rates import find_rate
from slimserve.loadtest.settings import LoadSettings, SuiteOptions

SEEDS = range(5)
SERVICE_S = 0.002
LIMIT_S = 0.010
FRAC = 0.9
START_RATE = 100.0
_SEED_STEP = 1000
"""Distance between two seeds; a search increments its seed for each run."""
_NUM_BISECTIONS = 60


def main() -> None:
    metrics: dict[str, list[float]] = {}
    analytic = max_rate(SERVICE_S, LIMIT_S, FRAC)
    print_status(
        f"M/D/1, {SERVICE_S * 1e3:g} ms each: p{FRAC * 100:g} is {LIMIT_S * 1e3:g} ms at {analytic:.1f} requests/s"
    )
    for seed in SEEDS[:1] if "--quick" in sys.argv[1:] else SEEDS:
        rate = _search(seed)
        print_status(f"seed {seed}: {rate:.1f} requests/s, {rate / analytic - 1:+.1%} from the analytic rate")
        metrics.setdefault("max_rate_ratio", []).append(rate / analytic)
        metrics.setdefault("max_rate_per_s", []).append(rate)
    metrics["analytic_rate_per_s"] = [analytic]
    print(bench_line("max-rate", metrics))


def max_rate(service_s: float, limit_s: float, frac: float) -> float:
    """Return the highest rate of an M/D/1 queue, in requests/s, at which a fraction `frac` meets the limit.

    The limit applies to the time from a request's arrival to the end of its service.
    """
    low, high = 0.0, 1 / service_s
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        if waiting_frac(limit_s - service_s, middle, service_s) >= frac:
            low = middle
        else:
            high = middle
    return low


def waiting_frac(wait_s: float, rate: float, service_s: float) -> float:
    """Return the fraction of requests that wait at most `wait_s` seconds in an M/D/1 queue.

    Erlang (1909): P(W ≤ x) = (1 − ρ) Σₖ [−λ(x − ks)]ᵏ / k! · exp(λ(x − ks)) over k ≤ x/s.
    The sum is exact for waits of a few service times. For longer waits its terms cancel beyond float precision.
    """
    terms = []
    for k in range(int(wait_s / service_s + 1e-9) + 1):
        exponent = rate * (wait_s - k * service_s)
        terms.append((-exponent) ** k / math.factorial(k) * math.exp(exponent))
    return (1 - rate * service_s) * math.fsum(terms)


def _search(seed: int) -> float:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_mock_server(MockSchedule(service_s=SERVICE_S), probe_hardware().cores[0]) as server,
    ):
        data = Path(folder) / "prompts.jsonl"
        data.write_text('{"prompt": "Hello"}\n', encoding="utf-8")
        settings = LoadSettings(
            rate=str(START_RATE),
            duration_s=10.0,
            warmup_s=2.0,
            cooldown_s=0.2,
            seed=seed * _SEED_STEP,
            slos=(f"e2e_p{FRAC * 100:g}={LIMIT_S * 1e3:g}ms",),
            suite=SuiteOptions(data=str(data), max_tokens="1"),
        )
        result = find_rate("chat", Target(server.url, MODEL), settings, Path(folder))
        if result.rate is None or not result.is_found:
            raise RuntimeError(f"seed {seed}: the search reported no rate: {result.ended}")
        return result.rate


if __name__ == "__main__":
    main()
