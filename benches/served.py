"""A running server as a benchmark asks it: prompts and items of fresh random tokens, timed by the wall clock."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from slimserve.compress.build import build_variant
from slimserve.compress.recipe import load_recipe
from slimserve.core.hardware import probe_hardware
from slimserve.core.model import resolve_model
from slimserve.serve.launch.plan import LaunchPlan, TrafficProfile, plan_launch
from slimserve.serve.launch.process import STOCK_COMMAND, EngineSpec, free_port

MODEL = "smollm2-135m-instruct"
_SERVED_NAME = "model"
_TOKEN_IDS = range(100, 49_000)
_LABELS = (1000, 2000)
_KEEPALIVE_S = 2.0
"""Shorter than the 5 s after which uvicorn closes an idle connection."""


@dataclass(frozen=True)
class ScoringLoad:
    """Requests of one shape."""

    prefix_tokens: int
    num_items: int
    item_tokens: int = 24


def stock_spec(log: Path, directory: Path | None = None) -> EngineSpec:
    """vLLM's own launch, with the KV cache's bytes of ours: its default wants 92% of a memory node to be free."""
    directory = directory or resolve_model(MODEL)
    ours = plan_launch(directory, probe_hardware())
    plan = LaunchPlan(tuple(choice for choice in ours.arguments if choice.name == "--kv-cache-memory-bytes"))
    return EngineSpec(directory, _SERVED_NAME, plan, log, free_port(), command=STOCK_COMMAND)


def our_spec(log: Path, directory: Path | None = None, profile: TrafficProfile = "balanced") -> EngineSpec:
    """Our launch of a variant."""
    directory = directory or resolve_model(MODEL)
    return EngineSpec(directory, _SERVED_NAME, plan_launch(directory, probe_hardware(), profile), log, free_port())


def built(recipe: str, *settings: str) -> Path:
    """The variant of a recipe, built if the cache has none."""
    return build_variant(MODEL, resolve_model(MODEL), *load_recipe(recipe, settings), None)


class Served:
    """Asks one server; every prompt is new, so that no cache knows it."""

    def __init__(self, client: httpx.AsyncClient, scoring_path: str) -> None:
        self._client = client
        self._scoring_path = scoring_path

    async def complete(self, prompt_tokens: int, output_tokens: int) -> float:
        """Seconds of one completion of exactly so many tokens."""
        body = {
            "prompt": _random_tokens(prompt_tokens),
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        return await self._post("/v1/completions", body)

    async def score(self, load: ScoringLoad) -> float:
        """Seconds of one scoring request."""
        body = {
            "query": _random_tokens(load.prefix_tokens),
            "items": [_random_tokens(load.item_tokens) for _ in range(load.num_items)],
            "label_token_ids": _LABELS,
            "apply_softmax": True,
        }
        return await self._post(self._scoring_path, body)

    async def decode_rate(self, num_streams: int, output_tokens: int, prompt_tokens: int = 32) -> float:
        """Output tokens per second of so many completions at once."""
        start = time.perf_counter()
        await asyncio.gather(*(self.complete(prompt_tokens, output_tokens) for _ in range(num_streams)))
        return num_streams * output_tokens / (time.perf_counter() - start)

    async def score_closed_loop(self, load: ScoringLoad, concurrency: int, num_requests: int) -> list[float]:
        """Seconds of each of `num_requests`, of which `concurrency` are always under way."""
        left = iter(range(num_requests))
        times: list[float] = []

        async def ask() -> None:
            times.extend([await self.score(load) for _ in left])

        await asyncio.gather(*(ask() for _ in range(concurrency)))
        return times

    async def _post(self, path: str, body: dict[str, object]) -> float:
        start = time.perf_counter()
        response = await self._client.post(path, json={"model": _SERVED_NAME, **body})
        seconds = time.perf_counter() - start
        if response.is_error:
            raise RuntimeError(f"{path} was answered {response.status_code}: {response.text[:300]}")
        return seconds


@asynccontextmanager
async def served(url: str, scoring_path: str = "/v1/score") -> AsyncIterator[Served]:
    """A client of the server at `url`, warmed up by one short completion."""
    limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEPALIVE_S)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        asker = Served(client, scoring_path)
        await asker.complete(64, 8)
        yield asker


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _random_tokens(count: int) -> list[int]:
    return random.choices(_TOKEN_IDS, k=count)
