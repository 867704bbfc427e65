"""Measure how much sooner scores arrive if a warm call reads the user's history while candidates are being retrieved.

    make bench-warm

A request has a history of 1,000 random tokens and 16 items of 24 tokens. Its candidates are known 0.5 s after the user
arrives; latency counts from then until the scores arrive. With the warm call, the history is sent to /v1/warm on
arrival; without it, nothing is sent before. Users arrive at half of the server's capacity: as many as that rate allows
in the length of a round, each at a random time, and at the same times on both sides. The sides take turns in five
rounds.

`warm_latency_ratio` is the median latency with the warm call over that without it, per round; the goal is at most 0.6.
The last line of output is one JSON object. `--quick` runs one short round.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benches.served import KEEPALIVE_S, ScoringLoad, median, our_spec, served
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.statistics import percentile
from slimserve.serve.launch.process import Engine

RETRIEVAL_S = 0.5
LOAD = ScoringLoad(prefix_tokens=1000, num_items=16)
LOAD_FRAC = 0.5
_LABELS = [1000, 2000]


def main() -> None:
    is_quick = "--quick" in sys.argv[1:]
    num_users, num_rounds = (6, 1) if is_quick else (40, 5)
    with tempfile.TemporaryDirectory() as folder, Engine(our_spec(Path(folder) / "engine.log", None, "prefill")) as one:
        samples = asyncio.run(_measure(one.spec.url, num_users, num_rounds))
    print(bench_line("warm", samples))


async def _measure(url: str, num_users: int, num_rounds: int) -> dict[str, list[float]]:
    async with served(url) as client:
        begun = time.perf_counter()
        await client.score_closed_loop(LOAD, 4, max(8, num_users // 2))
        rate = LOAD_FRAC * max(8, num_users // 2) / (time.perf_counter() - begun)
    print_status(f"users arrive at {rate:.2f}/s, half of the capacity")
    samples: dict[str, list[float]] = {"rate_rps": [rate]}
    for number in range(num_rounds):
        sides = {}
        for is_warm in (False, True) if number % 2 == 0 else (True, False):
            latencies = await _run_side(url, rate, num_users, number, is_warm)
            name = "warm" if is_warm else "cold"
            sides[name] = median(latencies)
            samples.setdefault(f"{name}_p50_s", []).append(sides[name])
            samples.setdefault(f"{name}_p99_s", []).append(percentile(latencies, 0.99))
        samples.setdefault("warm_latency_ratio", []).append(sides["warm"] / sides["cold"])
        print_status(f"round {number + 1}: {sides['cold']:.3f} s without, {sides['warm']:.3f} s with the warm call")
    return samples


async def _run_side(url: str, rate: float, num_users: int, seed: int, is_warm: bool) -> list[float]:
    """Return each user's latency in seconds from when the candidates are known."""
    arrivals, texts = random.Random(seed), random.Random(f"{seed} {is_warm}")
    # A Poisson process with a given number of arrivals: the load is the same in every round.
    times = [arrivals.uniform(0, num_users / rate) for _ in range(num_users)]
    limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        begun = time.perf_counter()

        async def wait_until(at_s: float) -> None:
            await asyncio.sleep(max(0.0, begun + at_s - time.perf_counter()))

        async def run_user(at_s: float) -> float:
            query = texts.choices(range(100, 49_000), k=LOAD.prefix_tokens)
            items = [texts.choices(range(100, 49_000), k=LOAD.item_tokens) for _ in range(LOAD.num_items)]
            await wait_until(at_s)
            warming = asyncio.create_task(client.post("/v1/warm", json={"query": query})) if is_warm else None
            await wait_until(at_s + RETRIEVAL_S)
            answer = await client.post(
                "/v1/score", json={"query": query, "items": items, "label_token_ids": _LABELS, "apply_softmax": True}
            )
            seconds = time.perf_counter() - begun - at_s - RETRIEVAL_S
            answer.raise_for_status()
            if warming is not None:
                (await warming).raise_for_status()
            return seconds

        return list(await asyncio.gather(*(run_user(at_s) for at_s in times)))


if __name__ == "__main__":
    main()
