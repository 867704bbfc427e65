"""Compare `slimserve`'s launch of vLLM with two launches of stock vLLM, on the same dense model.

    make bench-launch

Three servers start in turn in each of three rounds, and the order changes every round:

- `stock`: vLLM's defaults.
- `guide`: what vLLM's own documentation for CPUs advises, and no code of `slimserve` (`guide_spec` in
  benches/served.py).
- `ours`: the launch plan of `slimserve serve`.

All get the same KV cache size. Prompts are random tokens. `prefill_ratio` and `decode8_ratio` compare `ours` with
`stock` of the same round, and `…_over_guide_ratio` compares `ours` with `guide`. The last line of output is one JSON
object. The benchmark takes about 25 minutes on 2 cores; `--rounds N` runs N rounds instead of three, and `--quick`
one with short prompts.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benches.served import chosen_sizes, guide_spec, median, our_spec, served, stock_spec
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.serve.launch.process import Engine

SIDES = {"stock": stock_spec, "guide": guide_spec, "ours": our_spec}
NUM_STREAMS = 8


@dataclass(frozen=True)
class Sizes:
    """Amount of measuring: rounds, measurements per server start, and tokens of each request."""

    num_rounds: int
    num_repeats: int
    """Number of measurements per server start; the result is their median."""
    num_prefills: int
    prefill_tokens: int
    decode_tokens: int


FULL = Sizes(num_rounds=3, num_repeats=3, num_prefills=16, prefill_tokens=512, decode_tokens=96)
QUICK = Sizes(num_rounds=1, num_repeats=1, num_prefills=2, prefill_tokens=64, decode_tokens=8)


def main() -> None:
    sizes = chosen_sizes(FULL, QUICK)
    metrics: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(sizes.num_rounds):
            speeds = {}
            for name in SIDES if number % 2 == 0 else reversed(SIDES):
                with Engine(SIDES[name](Path(folder) / f"{name}-{number}.log")) as engine:
                    speeds[name] = asyncio.run(_measure(engine.spec.url, sizes)) | {"ready_s": engine.ready_s}
                print_status(f"round {number + 1}/{sizes.num_rounds} {name}: {_format_speeds(speeds[name])}")
            for name, measured in speeds.items():
                for metric, value in measured.items():
                    metrics.setdefault(f"{name}_{metric}", []).append(value)
            for side, suffix in (("stock", "ratio"), ("guide", "over_guide_ratio")):
                for metric in ("prefill_requests_per_s", "decode8_tokens_per_s"):
                    ratio = speeds["ours"][metric] / speeds[side][metric]
                    metrics.setdefault(f"{metric.split('_')[0]}_{suffix}", []).append(ratio)
    print(bench_line("launch", metrics))


async def _measure(url: str, sizes: Sizes) -> dict[str, float]:
    async with served(url) as server:

        async def prefills_per_s() -> float:
            start = time.perf_counter()
            await asyncio.gather(*(server.complete(sizes.prefill_tokens, 1) for _ in range(sizes.num_prefills)))
            return sizes.num_prefills / (time.perf_counter() - start)

        await server.complete(sizes.prefill_tokens, 8)
        return {
            "prefill_requests_per_s": median([await prefills_per_s() for _ in range(sizes.num_repeats)]),
            "decode8_tokens_per_s": median(
                [await server.decode_rate(NUM_STREAMS, sizes.decode_tokens) for _ in range(sizes.num_repeats)]
            ),
        }


def _format_speeds(speeds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in speeds.items())


if __name__ == "__main__":
    main()
