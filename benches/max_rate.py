"""`--find-max-rate` on a queue whose limit is known: the rate it finds over the analytic one, for five seeds.

    make bench-max-rate

A truth server (loadtest/mock_server.py) serves Poisson arrivals one after the other, 2 ms each (M/D/1), and the objective is
a p90 of 10 ms end to end, which holds up to 76% load. The distribution of the wait is Erlang's (1909). A service that
short makes ten seconds hold as many requests as ten minutes of one of 120 ms, and the scatter of p90 is what limits
such a search. Last line: one JSON object. About 25 minutes; `--quick` takes one seed.
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
_SEEDS_APART = 1000
"""A search takes a new seed for each of its runs."""
_ENOUGH_HALVINGS = 60


def main() -> None:
    figures: dict[str, list[float]] = {}
    analytic = highest_rate(SERVICE_S, LIMIT_S, FRAC)
    print_status(
        f"M/D/1, {SERVICE_S * 1e3:g} ms each: p{FRAC * 100:g} is {LIMIT_S * 1e3:g} ms at {analytic:.1f} requests/s"
    )
    for seed in SEEDS[:1] if "--quick" in sys.argv[1:] else SEEDS:
        found = _search(seed)
        print_status(f"seed {seed}: {found:.1f} requests/s, {found / analytic - 1:+.1%}")
        figures.setdefault("max_rate_ratio", []).append(found / analytic)
        figures.setdefault("max_rate_per_s", []).append(found)
    figures["analytic_rate_per_s"] = [analytic]
    print(bench_line("max-rate", figures))


def highest_rate(service_s: float, limit_s: float, frac: float) -> float:
    """Requests/s of an M/D/1 queue at which that share of them is served within the limit, from their arrival on."""
    low, high = 0.0, 1 / service_s
    for _ in range(_ENOUGH_HALVINGS):
        middle = (low + high) / 2
        if share_waiting_at_most(limit_s - service_s, middle, service_s) >= frac:
            low = middle
        else:
            high = middle
    return low


def share_waiting_at_most(wait_s: float, rate: float, service_s: float) -> float:
    """Erlang's P(W ≤ x) = (1 − ρ) Σₖ [−λ(x − ks)]ᵏ / k! · exp(λ(x − ks)) over k ≤ x/s.

    Exact for a few services' wait; the terms of many cancel and would need more digits than a float has.
    """
    terms = []
    for k in range(int(wait_s / service_s + 1e-9) + 1):
        left = rate * (wait_s - k * service_s)
        terms.append((-left) ** k / math.factorial(k) * math.exp(left))
    return (1 - rate * service_s) * math.fsum(terms)


def _search(seed: int) -> float:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_mock_server(MockSchedule(service_s=SERVICE_S), probe_hardware().cores[0]) as truth,
    ):
        data = Path(folder) / "prompts.jsonl"
        data.write_text('{"prompt": "Hello"}\n', encoding="utf-8")
        settings = LoadSettings(
            rate=str(START_RATE),
            duration_s=10.0,
            warmup_s=2.0,
            cooldown_s=0.2,
            seed=seed * _SEEDS_APART,
            slos=(f"e2e_p{FRAC * 100:g}={LIMIT_S * 1e3:g}ms",),
            suite=SuiteOptions(data=str(data), max_tokens="1"),
        )
        found = find_rate("chat", Target(truth.url, MODEL), settings, Path(folder))
        if found.rate is None or not found.is_found:
            raise RuntimeError(f"no rate was found: {found.ended}")
        return found.rate


if __name__ == "__main__":
    main()
