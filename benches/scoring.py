"""Compare scored candidates per second of vLLM's `/generative_scoring` with `slimserve`'s `/v1/score`.

    make bench-scoring

Each round starts four servers in turn: stock (dense), ours dense, ours W8A8, and ours pruned W8A8. The pruned model
lacks a quarter of its MLP neurons and one of three KV groups. Ratios are relative to the stock server of the same
round, with a prefix of 1,000 tokens and 32 items of 24 tokens. `w8a8_prefill_efficiency` is the time of a plain prefill
of the same number of tokens, divided by the scoring time. The last line of output is one JSON object. The benchmark
takes about 15 minutes on 2 cores.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benches.served import MODEL, ScoringLoad, built, median, our_spec, served, stock_spec
from slimserve.core.model import resolve_model
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.statistics import percentile
from slimserve.serve.launch.process import Engine, EngineSpec

NUM_ROUNDS = 3
NUM_REPEATS = 5
LOADS = tuple(ScoringLoad(prefix, items) for prefix in (200, 600, 1000) for items in (16, 32))
PRIMARY_LOAD = ScoringLoad(1000, 32)
CONCURRENT_LOAD = ScoringLoad(200, 16)
CONCURRENCIES = (1, 4, 16)
REQUESTS_PER_USER = 3
PRUNED = "prune.kv_remove_frac=0.34"


@dataclass(frozen=True)
class Side:
    """A server under test: one variant and the way to launch it."""

    name: str
    variant: Path
    stock: bool = False

    def spec(self, log: Path) -> EngineSpec:
        make_spec = stock_spec if self.stock else our_spec
        return make_spec(log, self.variant)


def main() -> None:
    dense = resolve_model(MODEL)
    sides = [
        Side("stock", dense, stock=True),
        Side("dense", dense),
        Side("w8a8", built("w8a8")),
        Side("pruned_w8a8", built("prune25-w8a8", PRUNED)),
    ]
    metrics: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(NUM_ROUNDS):
            rates = {}
            for side in sides if number % 2 == 0 else reversed(sides):
                with Engine(side.spec(Path(folder) / f"{side.name}-{number}.log")) as engine:
                    path = "/generative_scoring" if side.stock else "/v1/score"
                    measured = asyncio.run(_measure(engine.spec.url, path))
                rates[side.name] = measured[_items_per_s(PRIMARY_LOAD)]
                print_status(
                    f"round {number + 1}/{NUM_ROUNDS} {side.name}: {rates[side.name]:.1f} items/s at 1000 x 32"
                )
                for metric, value in measured.items():
                    metrics.setdefault(f"{side.name}_{metric}", []).append(value)
            for side in sides[1:]:
                metrics.setdefault(f"{side.name}_scoring_ratio", []).append(rates[side.name] / rates["stock"])
    print(bench_line("scoring", metrics))


async def _measure(url: str, path: str) -> dict[str, float]:
    metrics = {}
    async with served(url, path) as server:
        for load in LOADS:
            await server.score(load)
            seconds = [await server.score(load) for _ in range(NUM_REPEATS)]
            metrics[_items_per_s(load)] = load.num_items / median(seconds)
        prefills, scorings = [], []
        for _ in range(NUM_REPEATS):
            tokens = PRIMARY_LOAD.prefix_tokens + PRIMARY_LOAD.num_items * PRIMARY_LOAD.item_tokens
            prefills.append(await server.complete(tokens, 1))
            scorings.append(await server.score(PRIMARY_LOAD))
        metrics["prefill_efficiency"] = median(prefills) / median(scorings)
        for concurrency in CONCURRENCIES:
            seconds = await server.score_closed_loop(CONCURRENT_LOAD, concurrency, REQUESTS_PER_USER * concurrency)
            for percent in (50, 99):
                metrics[f"concurrent{concurrency}_p{percent}_s"] = percentile(seconds, percent / 100)
    return metrics


def _items_per_s(load: ScoringLoad) -> str:
    return f"items_per_s_{load.prefix_tokens}x{load.num_items}"


if __name__ == "__main__":
    main()
