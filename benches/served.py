"""Launch specifications and a timed client for benchmarks of a running server."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx

from slimserve.compress.build import build_variant
from slimserve.compress.recipe import load_recipe
from slimserve.core.errors import UserError
from slimserve.core.hardware import probe_hardware
from slimserve.core.model import resolve_model
from slimserve.serve.launch.plan import Choice, LaunchPlan, TrafficProfile, plan_launch
from slimserve.serve.launch.process import STOCK_COMMAND, EngineSpec, free_port

MODEL = "smollm2-135m-instruct"
QUICK_BUILD = ("calibration.num_samples=2", "calibration.sequence_length=128")
"""Settings of `built` for `--quick`: a build takes a minute, and the variant has the same shapes but less quality."""
_SERVED_NAME = "model"
_TOKEN_IDS = range(100, 49_000)
_LABELS = (1000, 2000)
KEEPALIVE_S = 2.0
"""Seconds that an idle connection stays open; uvicorn closes idle connections after 5 s."""

Sizes = TypeVar("Sizes")


@dataclass(frozen=True)
class ScoringLoad:
    """Shape of a scoring request, in tokens and items."""

    prefix_tokens: int
    num_items: int
    item_tokens: int = 24


def chosen_sizes(full: Sizes, quick: Sizes) -> Sizes:
    """Return the sizes that the command line asks for: `quick` with --quick, and other rounds with --rounds N.

    Both are dataclasses with a field `num_rounds`. Options of the benchmark itself are not read here.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="One round with short requests.")
    parser.add_argument("--rounds", type=int, help="Number of rounds.")
    options, _ = parser.parse_known_args()
    sizes = quick if options.quick else full
    if not options.rounds:
        return sizes
    changed: Sizes = replace(cast(Any, sizes), num_rounds=options.rounds)
    return changed


def stock_spec(log: Path, directory: Path | None = None) -> EngineSpec:
    """Return vLLM's default launch with our KV cache size.

    vLLM's default cache size requires that 92% of a memory node is free.
    """
    directory = directory or resolve_model(MODEL)
    ours = plan_launch(directory, probe_hardware())
    plan = LaunchPlan(tuple(choice for choice in ours.arguments if choice.name == "--kv-cache-memory-bytes"))
    return EngineSpec(directory, _SERVED_NAME, plan, log, free_port(), command=STOCK_COMMAND)


def guide_spec(log: Path, directory: Path | None = None) -> EngineSpec:
    """Return a launch of stock vLLM as vLLM's own documentation advises, without any code of slimserve.

    The source is the page "CPU" of vLLM's installation guide. It advises to preload TCMalloc and Intel's OpenMP, to
    bind the threads, to set the KV cache size, and to use a multiple of 32 as block size. A block size of 32 lets
    requests share the largest part of a prefix. The page also advises bfloat16, which the model has.

    Raises UserError if a library is missing.
    """
    directory, hardware = directory or resolve_model(MODEL), probe_hardware()
    ours = plan_launch(directory, hardware)
    preload = next((choice for choice in ours.environment if choice.name == "LD_PRELOAD"), Choice("LD_PRELOAD", "", ""))
    if "tcmalloc" not in preload.value or "iomp5" not in preload.value:
        raise UserError(
            preload.name,
            preload.value,
            "lacks TCMalloc or Intel's OpenMP, which vLLM's guide preloads",
            "run `apt-get install libtcmalloc-minimal4` and `make install`",
        )
    # The guide also advises to keep a core for the server, as stock vLLM does by default. On 2 cores this halves the
    # threads that compute, so this launch binds all cores, which is the stronger alternative.
    cores = ",".join(map(str, hardware.cores))
    binding = Choice("VLLM_CPU_OMP_THREADS_BIND", cores, "one thread per core, on all cores")
    # VLLM_CPU_KVCACHE_SPACE takes whole GiB only, so the argument that vLLM 0.32 offers instead gives our exact size.
    names = ("--block-size", "--kv-cache-memory-bytes")
    plan = LaunchPlan(tuple(choice for choice in ours.arguments if choice.name in names), (preload, binding))
    return EngineSpec(directory, _SERVED_NAME, plan, log, free_port(), command=STOCK_COMMAND)


def our_spec(log: Path, directory: Path | None = None, profile: TrafficProfile = "balanced") -> EngineSpec:
    """Return our launch of the variant in `directory`; the default is the dense model."""
    directory = directory or resolve_model(MODEL)
    return EngineSpec(directory, _SERVED_NAME, plan_launch(directory, probe_hardware(), profile), log, free_port())


def built(recipe: str, *settings: str) -> Path:
    """Return the directory of a recipe's variant; build it if the cache does not hold it."""
    settings = ("calibration.source=mixed", *settings)
    return build_variant(MODEL, resolve_model(MODEL), *load_recipe(recipe, settings), None)


class Served:
    """Client of one server; every prompt is random, so that the prefix cache never contains it."""

    def __init__(self, client: httpx.AsyncClient, scoring_path: str) -> None:
        self._client = client
        self._scoring_path = scoring_path

    async def complete(self, prompt_tokens: int, output_tokens: int) -> float:
        """Return the seconds of one completion of exactly `output_tokens` tokens."""
        body = {
            "prompt": _random_tokens(prompt_tokens),
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        return await self._post("/v1/completions", body)

    async def score(self, load: ScoringLoad) -> float:
        """Return the seconds of one scoring request."""
        body = {
            "query": _random_tokens(load.prefix_tokens),
            "items": [_random_tokens(load.item_tokens) for _ in range(load.num_items)],
            "label_token_ids": _LABELS,
            "apply_softmax": True,
        }
        return await self._post(self._scoring_path, body)

    async def decode_rate(self, num_streams: int, output_tokens: int, prompt_tokens: int = 32) -> float:
        """Return the output tokens per second of `num_streams` concurrent completions."""
        start = time.perf_counter()
        await asyncio.gather(*(self.complete(prompt_tokens, output_tokens) for _ in range(num_streams)))
        return num_streams * output_tokens / (time.perf_counter() - start)

    async def score_closed_loop(self, load: ScoringLoad, concurrency: int, num_requests: int) -> list[float]:
        """Return the seconds of each of `num_requests` requests, with `concurrency` requests in flight."""
        remaining = iter(range(num_requests))
        seconds: list[float] = []

        async def run_user() -> None:
            seconds.extend([await self.score(load) for _ in remaining])

        await asyncio.gather(*(run_user() for _ in range(concurrency)))
        return seconds

    async def _post(self, path: str, body: dict[str, object]) -> float:
        start = time.perf_counter()
        response = await self._client.post(path, json={"model": _SERVED_NAME, **body})
        seconds = time.perf_counter() - start
        if response.is_error:
            raise RuntimeError(f"{path} returned HTTP {response.status_code}: {response.text[:300]}")
        return seconds


@asynccontextmanager
async def served(url: str, scoring_path: str = "/v1/score") -> AsyncIterator[Served]:
    """Yield a client of the server at `url` after one short warm-up completion."""
    limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        served_client = Served(client, scoring_path)
        await served_client.complete(64, 8)
        yield served_client


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _random_tokens(count: int) -> list[int]:
    return random.choices(_TOKEN_IDS, k=count)
