"""Compare the start-up time of vLLM's default launch with `slimserve`'s launch.

    make bench-ready

The start-up time is the time from the command to the first token, in seconds. Each round has new, empty compile caches;
the first start fills them and the later start reuses them. Both servers start in turn in each round. `ready_ratio` is
our time divided by the stock time, for later starts. `decode8_ratio` shows that the faster start does not cost decoding
speed. The last line of output is one JSON object. The benchmark takes about 15 minutes on 2 cores.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benches.served import our_spec, served, stock_spec
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.serve.launch.plan import Choice
from slimserve.serve.launch.process import Engine

NUM_ROUNDS = 3


def main() -> None:
    metrics: dict[str, list[float]] = {}
    for number in range(NUM_ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            sides = ["stock", "ours"] if number % 2 == 0 else ["ours", "stock"]
            measured: dict[str, float] = {}
            for start in ("first", "later"):
                for side in sides:
                    seconds, decode8 = _start(side, Path(folder) / side)
                    print_status(
                        f"round {number + 1}/{NUM_ROUNDS} {side}, {start} start: first token after {seconds:.1f} s"
                    )
                    measured |= {f"{side}_{start}_s": seconds, f"{side}_decode8": decode8}
            for metric, value in measured.items():
                metrics.setdefault(metric, []).append(value)
            metrics.setdefault("ready_ratio", []).append(measured["ours_later_s"] / measured["stock_later_s"])
            metrics.setdefault("first_ready_ratio", []).append(measured["ours_first_s"] / measured["stock_first_s"])
            metrics.setdefault("decode8_ratio", []).append(measured["ours_decode8"] / measured["stock_decode8"])
    print(bench_line("ready", metrics))


def _start(side: str, caches: Path) -> tuple[float, float]:
    """Start a server; return the seconds until its first completion and the tokens per second of 8 streams."""
    spec = (stock_spec if side == "stock" else our_spec)(caches / "engine.log")
    kept = tuple(choice for choice in spec.plan.environment if choice.name != "TORCHINDUCTOR_CACHE_DIR")
    cache_choice = Choice("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"), "an empty cache for each round")
    plan = replace(spec.plan, environment=(*kept, cache_choice))
    with _environment_variable("VLLM_CACHE_ROOT", str(caches / "vllm")):
        start = time.perf_counter()
        with Engine(replace(spec, plan=plan)) as engine:
            return asyncio.run(_measure(engine.spec.url, start))


async def _measure(url: str, start: float) -> tuple[float, float]:
    async with served(url) as server:
        seconds = time.perf_counter() - start
        await server.decode_rate(8, 32)
        return seconds, await server.decode_rate(8, 128)


@contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


if __name__ == "__main__":
    main()
