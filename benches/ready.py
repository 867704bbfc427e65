"""Seconds from the command to the first token: vLLM's own launch against ours, first and later starts.

    make bench-ready

First starts have empty compile caches (a folder of their own per round), later ones find what the first left. Each
round times stock and ours in turn. `ready_ratio` is ours over stock's, later starts; `decode8_ratio` shows that the
time was not taken from the speed. Last line: one JSON object. Takes about a quarter of an hour on 2 cores.
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
    figures: dict[str, list[float]] = {}
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
            for figure, value in measured.items():
                figures.setdefault(figure, []).append(value)
            figures.setdefault("ready_ratio", []).append(measured["ours_later_s"] / measured["stock_later_s"])
            figures.setdefault("first_ready_ratio", []).append(measured["ours_first_s"] / measured["stock_first_s"])
            figures.setdefault("decode8_ratio", []).append(measured["ours_decode8"] / measured["stock_decode8"])
    print(bench_line("ready", figures))


def _start(side: str, caches: Path) -> tuple[float, float]:
    """Seconds until a completion of one token is answered, and tokens per second of 8 streams after it."""
    spec = (stock_spec if side == "stock" else our_spec)(caches / "engine.log")
    kept = tuple(choice for choice in spec.plan.environment if choice.name != "TORCHINDUCTOR_CACHE_DIR")
    where = Choice("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"), "this round's own")
    plan = replace(spec.plan, environment=(*kept, where))
    with _variable("VLLM_CACHE_ROOT", str(caches / "vllm")):
        start = time.perf_counter()
        with Engine(replace(spec, plan=plan)) as engine:
            return asyncio.run(_ask(engine.spec.url, start))


async def _ask(url: str, start: float) -> tuple[float, float]:
    async with served(url) as server:
        seconds = time.perf_counter() - start
        await server.decode_rate(8, 32)
        return seconds, await server.decode_rate(8, 128)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
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
