"""Compare scored candidates per second of vLLM's `/generative_scoring` with `slimserve`'s `/v1/score`.

    make bench-scoring

Five servers start in turn in each of three rounds, and the order changes every round:

- `stock`: the dense model with vLLM's defaults.
- `guide`: the dense model with what vLLM's own documentation for CPUs advises, and no code of `slimserve` (`guide_spec`
  in benches/served.py).
- `dense`, `w8a8`, `pruned_w8a8`: our server. The pruned model lacks a quarter of its MLP neurons and one of three KV
  groups.

Ratios compare items/s of the same round, with a prefix of 1,000 tokens and 32 items of 24 tokens. `…_scoring_ratio` is
relative to `stock`, and `…_over_guide_ratio` to `guide`. The goals:

| ratio | goal |
|---|---|
| `dense_over_guide_ratio` | at least 1.45 |
| `w8a8_over_guide_ratio` | at least 1.8 |
| `pruned_w8a8_over_guide_ratio` | at least 2.4 |

With `--exact-cost` only our server of the dense model is measured, with and without the exact scores of
serve/engine/label_logits.py. `exact_scores_cost_frac` is the fraction of items/s that they cost.

`w8a8_prefill_efficiency` is the time of a plain prefill of the same number of tokens, divided by the scoring time. The
last line of output is one JSON object. The benchmark takes about 20 minutes on 2 cores; `--rounds N` runs N rounds
instead of three, and `--quick` one with short prompts and little calibration data.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benches.served import (
    MODEL,
    QUICK_BUILD,
    ScoringLoad,
    built,
    chosen_sizes,
    guide_spec,
    median,
    our_spec,
    served,
    stock_spec,
)
from slimserve.core.model import resolve_model
from slimserve.core.progress import print_status
from slimserve.core.provenance import bench_line
from slimserve.core.statistics import percentile
from slimserve.serve.engine.label_logits import EXACT_VARIABLE
from slimserve.serve.launch.plan import Choice
from slimserve.serve.launch.process import Engine, EngineSpec

PRUNED = "prune.kv_remove_frac=0.34"
STOCK_PATH = "/generative_scoring"


@dataclass(frozen=True)
class Sizes:
    """Amount of measuring: rounds, measurements per load, and the loads."""

    num_rounds: int
    num_repeats: int
    loads: tuple[ScoringLoad, ...]
    primary_load: ScoringLoad
    """The load of the ratios, which is one of `loads`."""
    concurrent_load: ScoringLoad
    concurrencies: tuple[int, ...]
    requests_per_user: int
    build_settings: tuple[str, ...] = ()


FULL = Sizes(
    num_rounds=3,
    num_repeats=5,
    loads=tuple(ScoringLoad(prefix, items) for prefix in (200, 600, 1000) for items in (16, 32)),
    primary_load=ScoringLoad(1000, 32),
    concurrent_load=ScoringLoad(200, 16),
    concurrencies=(1, 4, 16),
    requests_per_user=3,
)
QUICK = Sizes(
    num_rounds=1,
    num_repeats=1,
    loads=(ScoringLoad(64, 4),),
    primary_load=ScoringLoad(64, 4),
    concurrent_load=ScoringLoad(32, 2),
    concurrencies=(1,),
    requests_per_user=1,
    build_settings=QUICK_BUILD,
)

_SHORT = ScoringLoad(200, 16)
EXACT_COST = replace(QUICK, num_rounds=3, num_repeats=9, loads=(_SHORT,), primary_load=_SHORT)


@dataclass(frozen=True)
class Side:
    """A server under test: one variant, the way to launch it, and the path of its scoring route."""

    name: str
    variant: Path
    make_spec: Callable[[Path, Path], EngineSpec] = our_spec
    path: str = "/v1/score"


def main() -> None:
    if "--exact-cost" in sys.argv[1:]:
        _measure_exact_cost()
        return
    sizes = chosen_sizes(FULL, QUICK)
    dense = resolve_model(MODEL)
    sides = [
        Side("stock", dense, stock_spec, STOCK_PATH),
        Side("guide", dense, guide_spec, STOCK_PATH),
        Side("dense", dense),
        Side("w8a8", built("w8a8", *sizes.build_settings)),
        Side("pruned_w8a8", built("prune25-w8a8", PRUNED, *sizes.build_settings)),
    ]
    metrics: dict[str, list[float]] = {}
    for rates in _rounds(sides, sizes, metrics):
        for side in sides[1:]:
            metrics.setdefault(f"{side.name}_scoring_ratio", []).append(rates[side.name] / rates["stock"])
        for side in sides[2:]:
            metrics.setdefault(f"{side.name}_over_guide_ratio", []).append(rates[side.name] / rates["guide"])
    print(bench_line("scoring", metrics))


def _measure_exact_cost() -> None:
    dense = resolve_model(MODEL)
    metrics: dict[str, list[float]] = {}
    for rates in _rounds([Side("exact", dense), Side("rounded", dense, _rounded_spec)], EXACT_COST, metrics):
        metrics.setdefault("exact_scores_cost_frac", []).append(1 - rates["exact"] / rates["rounded"])
    print(bench_line("scoring-exact-cost", metrics))


def _rounded_spec(log: Path, directory: Path) -> EngineSpec:
    spec = our_spec(log, directory)
    switch = Choice(EXACT_VARIABLE, "0", "to measure what exact scores cost")
    return replace(spec, plan=replace(spec.plan, environment=(*spec.plan.environment, switch)))


def _rounds(sides: Sequence[Side], sizes: Sizes, metrics: dict[str, list[float]]) -> Iterator[dict[str, float]]:
    """Measure all sides in turn in each round, add what is measured to `metrics`, and yield the round's items/s."""
    primary = _items_per_s(sizes.primary_load)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(sizes.num_rounds):
            rates = {}
            for side in sides if number % 2 == 0 else reversed(sides):
                log = Path(folder) / f"{side.name}-{number}.log"
                with Engine(side.make_spec(log, side.variant)) as engine:
                    measured = asyncio.run(_measure(engine.spec.url, side.path, sizes))
                rates[side.name] = measured[primary]
                print_status(f"round {number + 1}/{sizes.num_rounds} {side.name}: {primary} {rates[side.name]:.1f}")
                for metric, value in measured.items():
                    metrics.setdefault(f"{side.name}_{metric}", []).append(value)
            yield rates


async def _measure(url: str, path: str, sizes: Sizes) -> dict[str, float]:
    metrics = {}
    async with served(url, path) as server:
        for load in sizes.loads:
            await server.score(load)
            seconds = [await server.score(load) for _ in range(sizes.num_repeats)]
            metrics[_items_per_s(load)] = load.num_items / median(seconds)
        prefills, scorings = [], []
        load = sizes.primary_load
        for _ in range(sizes.num_repeats):
            prefills.append(await server.complete(load.prefix_tokens + load.num_items * load.item_tokens, 1))
            scorings.append(await server.score(load))
        metrics["prefill_efficiency"] = median(prefills) / median(scorings)
        for concurrency in sizes.concurrencies:
            num_requests = sizes.requests_per_user * concurrency
            seconds = await server.score_closed_loop(sizes.concurrent_load, concurrency, num_requests)
            for percent in (50, 99):
                metrics[f"concurrent{concurrency}_p{percent}_s"] = percentile(seconds, percent / 100)
    return metrics


def _items_per_s(load: ScoringLoad) -> str:
    return f"items_per_s_{load.prefix_tokens}x{load.num_items}"


if __name__ == "__main__":
    main()
